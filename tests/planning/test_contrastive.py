"""The plan of a CLIP: what is counted against the same by hand."""

import pytest

from tinyldm.config import make_config
from tinyldm.objectives.contrastive import ROWS_AT_ONCE
from tinyldm.planning.plan import OVERHEAD, make_plan
from tinyldm.planning.show import render

VISION = dict(patch=8, width=32, layers=3, heads=2, embed=16)
TEXT = dict(width=24, layers=2, heads=2, mlp_width=96, context_length=20)


def plan_of(loss="clip", must_fit=True, **changes):
    words = dict(objective="contrastive", objective_options=VISION | {"loss": loss}, text=TEXT, resolution=32, batch_size=64, vocab_size=500)
    return make_plan(make_config(**words | changes), must_fit)


def transformer(tokens: int, width: int, layers: int) -> int:
    """FLOPs: four products of the attention and two of an MLP of four times the width; q k^T and p v."""
    return layers * (2 * tokens * (4 + 8) * width**2 + 4 * tokens**2 * width)


def test_the_flops_are_those_of_two_transformers_and_of_all_pairs():
    phase, = plan_of().phases
    patches = (32 // 8) ** 2
    vision = 2 * patches * 3 * 8**2 * 32 + transformer(patches + 1, 32, 3) + 2 * 32 * 16
    text = transformer(20, 24, 2) + 2 * 24 * 16
    pair = 2 * 64 * 16                                          # of a picture with all captions; CLIP's loss also has the reverse
    assert phase.flops == {"net": 3 * vision, "text": 3 * text, "pairs": 3 * 2 * pair}
    assert plan_of("siglip").phases[0].flops["pairs"] == 3 * pair
    assert phase.rate == pytest.approx(0.55 * 209.5e12 / (3 * (vision + text + 2 * pair)))
    cut, = plan_of(grad_accum=4).phases                         # features first, then micro-batches: a second forward pass
    assert cut.useful == phase.useful and cut.rate == pytest.approx(0.55 * 209.5e12 / (4 * (vision + text) + 6 * pair))


def test_the_memory_has_the_pictures_of_the_whole_batch_and_the_comparison_of_all_pairs():
    """Of every number that is compared: two logits, their log-softmax, the target, and a gradient; SigLIP's has one logit."""
    one, two = (plan_of(batch_size=size).phases[0] for size in (512, 2048))
    kind = "two batches, fp32"
    assert two.memory()[kind] == 4 * one.memory()[kind] == 2 * 2048 * (4 * 3 * 32**2 + 8 * 20)
    assert one.compared == pytest.approx(6 * 4 * 512**2, rel=0.1) and two.compared == pytest.approx(6 * 4 * ROWS_AT_ONCE * 2048, rel=0.1)
    assert plan_of("siglip", batch_size=512).phases[0].compared == pytest.approx(4 * 4 * 512**2, rel=0.1)
    assert sum(one.memory().values()) - one.compared < 1e9 * one.memory_gb()
    assert plan_of(grad_accum=4).phases[0].activations * 64 == pytest.approx(sum(plan_of().phases[0].saved.values()) * 1.6 * 64)


def test_the_plan_of_a_clip_has_its_steps_and_speaks_of_no_latents():
    plan = plan_of(max_steps=300, grad_accum=4)
    assert plan.phases[0].steps == 300
    text = render(plan)
    assert all(word in text for word in ("picture tower", "text encoder", "16 x 4", "comparison of all pairs"))
    assert not any(word in text for word in ("unet", "VAE", "sample grid", "encoding,", "on disk", "compiled"))
    timed = plan_of(max_steps=0, budget="1h")
    assert timed.phases[0].hours == pytest.approx(1 - OVERHEAD, rel=1e-3)


def test_a_clip_that_does_not_fit_names_a_setting_that_does():
    with pytest.raises(ValueError, match=r"--grad-accum \d+ \(micro-batch \d+\) would fit"):
        plan_of(batch_size=32_768, gpu_gb=8.0)
    with pytest.raises(ValueError, match="shrink it .--objective-options width=, --text width=.$"):
        plan_of(gpu_gb=1.0)
