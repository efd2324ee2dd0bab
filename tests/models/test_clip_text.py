"""CLIP's text tower by itself; tests/vendor_loaders/test_clip.py compares it with that of transformers."""

import pytest
import torch
from parity import error

from tinyldm.models.clip_text import CLIPText, CLIPTextConfig

TINY = dict(vocab_size=100, width=64, layers=3, heads=4, mlp_width=160, context_length=16,
            bos_token_id=98, eos_token_id=99)


def build(**changes) -> CLIPText:
    """A tiny tower whose weights, biases and norms all matter."""
    torch.manual_seed(0)
    net = CLIPText(CLIPTextConfig(**(TINY | changes)))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.normal_(1.0, 0.3)
            elif p.dim() == 1:
                p.normal_(0.0, 0.3)
            else:
                p.normal_(0.0, 1.0 if "embedding" in name else p.shape[1] ** -0.5)
    return net.eval()


def captions(b: int = 5, n: int = 16) -> torch.Tensor:
    """Rows of ids: BOS, words, EOS at a different place in each row, padded with EOS."""
    ids = torch.randint(0, 98, (b, n), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 98
    for row in range(b):
        ids[row, 3 + 2 * row:] = 99
    return ids


@torch.no_grad()
def test_skipping_a_layer_equals_a_tower_stored_without_it():
    net = build()
    skipped = net(captions(), skip_last=1).hidden
    del net.layers[-1]
    assert torch.equal(net(captions()).hidden, skipped)


@torch.no_grad()
def test_the_two_activations_differ():
    a, b = build(activation="gelu"), build(activation="quick_gelu")
    assert error(a(captions()).hidden, b(captions()).hidden) > 1e-3


@torch.no_grad()
def test_pooled_is_the_feature_at_the_first_eos():
    features = build()(captions())
    for row in range(5):
        assert torch.equal(features.pooled[row], features.hidden[row, 3 + 2 * row])


@torch.no_grad()
def test_a_token_does_not_change_the_features_before_it():
    net, ids = build(), captions()
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % 98
    a, b = net(ids).hidden, net(changed).hidden
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@torch.no_grad()
def test_features_do_not_depend_on_the_batch_or_on_what_follows():
    net, ids = build(), captions()
    whole = net(ids).hidden
    assert error(net(ids[2:3]).hidden, whole[2:3]) < 1e-6
    assert error(net(ids[:, :9]).hidden, whole[:, :9]) < 1e-6


@pytest.mark.parametrize("projection_dim", [None, 24])
def test_gradients_reach_every_parameter(projection_dim):
    net = build(projection_dim=projection_dim)
    features = net(captions())
    (features.hidden.square().sum() + features.pooled.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_fresh_tower_keeps_features_in_scale_under_bf16_autocast():
    torch.manual_seed(0)
    net = CLIPText(CLIPTextConfig(**(TINY | dict(layers=12))))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = net(captions()).hidden
    assert torch.isfinite(hidden).all() and 0.5 < hidden.std() < 2


def test_the_default_config_is_the_text_tower_of_stable_diffusion_1():
    with torch.device("meta"):
        net = CLIPText(CLIPTextConfig())
    assert sum(p.numel() for p in net.parameters()) == 123_060_480


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="quick_gelu"):
        CLIPText(CLIPTextConfig(**TINY, activation="relu"))
    with pytest.raises(ValueError, match="truncate"):
        build()(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="use 0 to 3"):
        build()(captions(), skip_last=4)
