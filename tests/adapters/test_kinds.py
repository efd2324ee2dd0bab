"""The kinds of adapters: each formula beside one by hand, and beside peft's own layers."""

import pytest
import torch
from torch import nn

from tinyldm.adapters.kinds import DoRA, build
from tinyldm.adapters.low_rank import LowRank

UNSTATED = lambda rank: None


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def delta(fields, weight, scale=UNSTATED):
    return build(fields, scale).delta(weight).view(weight.shape)


def test_alpha_of_the_layer_comes_before_what_the_header_states_and_without_either_the_scale_is_one():
    fields, weight = {"down": random(4, 6), "up": random(8, 4)}, torch.zeros(8, 6)
    product = fields["up"] @ fields["down"]
    assert torch.allclose(delta(fields, weight), product)
    assert torch.allclose(delta(fields, weight, lambda rank: 3 / rank), 0.75 * product)
    assert torch.allclose(delta(fields | {"alpha": torch.tensor(2.0)}, weight, lambda rank: 3 / rank), 0.5 * product)
    assert torch.allclose(delta(fields | {"alpha": torch.tensor(0.0)}, weight), product)        # kohya: 0 means the rank
    assert torch.allclose(delta({name: field.half() for name, field in fields.items()}, weight), product, atol=1e-2)


def test_tucker_s_form_of_lora_is_a_sequence_of_three_convolutions():
    fields = {"down": random(3, 6, 1, 1), "mid": random(3, 3, 3, 3), "up": random(8, 3, 1, 1), "alpha": torch.tensor(1.5)}
    x, weight = random(1, 6, 5, 5), torch.zeros(8, 6, 3, 3)
    conv = nn.functional.conv2d
    expected = 0.5 * conv(conv(conv(x, fields["down"]), fields["mid"]), fields["up"])
    assert torch.allclose(conv(x, delta(fields, weight)), expected, atol=1e-4)


def test_loha_is_the_product_of_two_low_rank_matrices_number_by_number():
    fields = {f"hada_w{i}_{side}": random(*shape, seed=i) for i in (1, 2) for side, shape in (("a", (8, 2)), ("b", (2, 54)))}
    expected = 2 * (fields["hada_w1_a"] @ fields["hada_w1_b"]) * (fields["hada_w2_a"] @ fields["hada_w2_b"])
    found = delta(fields | {"alpha": torch.tensor(4.0)}, torch.zeros(8, 6, 3, 3))
    assert torch.allclose(found, expected.view(8, 6, 3, 3))


def test_loha_in_tucker_s_form_multiplies_two_convolutions_with_a_core():
    fields = {f"hada_{name}{i}{side}": random(*shape, seed=i) for i in (1, 2)
              for name, side, shape in (("w", "_a", (2, 8)), ("w", "_b", (2, 6)), ("t", "", (2, 2, 3, 3)))}
    whole = 1.0
    for i in (1, 2):
        core, a, b = fields[f"hada_t{i}"], fields[f"hada_w{i}_a"], fields[f"hada_w{i}_b"]
        whole = whole * sum(torch.einsum("o,i,kl->oikl", a[r], b[s], core[r, s]) for r in range(2) for s in range(2))
    assert torch.allclose(delta(fields, torch.zeros(8, 6, 3, 3)), whole, atol=1e-5)


def kron(a, b):
    """Blocks of b, each times a number of a."""
    return torch.cat([torch.cat([number * b for number in row], dim=1) for row in a])


def test_lokr_is_a_kronecker_product_whose_factors_may_be_products_and_alpha_is_of_these():
    whole = {"lokr_w1": random(2, 3), "lokr_w2": random(4, 5), "alpha": torch.tensor(7.0)}
    weight = torch.zeros(8, 15)
    assert torch.allclose(delta(whole, weight), kron(whole["lokr_w1"], whole["lokr_w2"]))       # two whole factors: alpha is ignored
    split = {"lokr_w1": random(2, 3), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 5), "alpha": torch.tensor(1.0)}
    assert torch.allclose(delta(split, weight), 0.5 * kron(split["lokr_w1"], split["lokr_w2_a"] @ split["lokr_w2_b"]), atol=1e-6)
    both = {"lokr_w1_a": random(2, 1), "lokr_w1_b": random(1, 3), "lokr_w2": random(4, 5), "alpha": torch.tensor(0.25)}
    assert torch.allclose(delta(both, weight), 0.25 * kron(both["lokr_w1_a"] @ both["lokr_w1_b"], both["lokr_w2"]), atol=1e-6)


def test_lokr_of_a_convolution_has_the_kernel_in_its_second_factor():
    fields = {"lokr_w1": random(2, 3), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 2, 3, 3)}
    second = torch.einsum("or,rikl->oikl", fields["lokr_w2_a"], fields["lokr_w2_b"])
    found = delta(fields, torch.zeros(8, 6, 3, 3))
    assert torch.allclose(found[:4, 2:4], fields["lokr_w1"][0, 1] * second, atol=1e-6)
    assert torch.allclose(found[4:, 4:], fields["lokr_w1"][1, 2] * second, atol=1e-6)
    tucker = {"lokr_w1": random(2, 3), "lokr_t2": random(2, 2, 3, 3), "lokr_w2_a": random(2, 4), "lokr_w2_b": random(2, 2)}
    core = torch.einsum("rskl,ro,si->oikl", tucker["lokr_t2"], tucker["lokr_w2_a"], tucker["lokr_w2_b"])
    assert torch.allclose(delta(tucker, torch.zeros(8, 6, 3, 3))[4:, :2], tucker["lokr_w1"][1, 0] * core, atol=1e-6)


def test_dora_gives_rows_or_columns_the_stored_norm():
    fields, weight = {"down": random(2, 6), "up": random(8, 2)}, random(8, 6)
    changed = weight + fields["up"] @ fields["down"]
    for shape in ((8,), (8, 1)):                                        # peft's magnitude, and LyCORIS' on rows
        magnitude = random(*shape).abs() + 1
        field = "magnitude" if len(shape) == 1 else "dora_scale"
        result = weight + delta(fields | {field: magnitude}, weight)
        assert torch.allclose(result.norm(dim=1), magnitude.flatten(), atol=1e-5)
        assert torch.allclose(result / result.norm(dim=1, keepdim=True), changed / changed.norm(dim=1, keepdim=True), atol=1e-5)
    magnitude = random(1, 6).abs() + 1
    result = weight + delta(fields | {"dora_scale": magnitude}, weight)
    assert torch.allclose(result.norm(dim=0), magnitude[0], atol=1e-5)
    kernel = {"down": random(2, 6, 3, 3), "up": random(6, 2, 1, 1), "dora_scale": random(1, 6, 1, 1).abs() + 1}
    weight = random(6, 6, 3, 3)                                         # as many rows as columns: the shape alone decides
    assert torch.allclose((weight + delta(kernel, weight)).square().sum((0, 2, 3)).sqrt(), kernel["dora_scale"].flatten(), atol=1e-5)
    rows = kernel | {"dora_scale": kernel["dora_scale"].transpose(0, 1)}
    assert torch.allclose((weight + delta(rows, weight)).square().sum((1, 2, 3)).sqrt(), kernel["dora_scale"].flatten(), atol=1e-5)


def test_loha_and_lokr_may_be_dora_too():
    fields = {"lokr_w1": random(2, 3), "lokr_w2": random(4, 2), "dora_scale": torch.full((8, 1), 2.0)}
    weight = random(8, 6)
    assert isinstance(build(fields, UNSTATED), DoRA)
    assert torch.allclose((weight + delta(fields, weight)).norm(dim=1), torch.full((8,), 2.0), atol=1e-5)


@pytest.mark.parametrize("fields, message", [
    ({"down": (4, 6)}, "it is LoRA without up"),
    ({"down": (4, 6), "up": (8, 3)}, r"its rank is 4 in one of its two matrices, \[4, 6\], and 3 in the other, \[8, 3\]"),
    ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 6)}, "it is LoHa without hada_w2_a and hada_w2_b"),
    ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (3, 6)}, "the shapes of its tensors do not fit together"),
    ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2)}, "it is LoKr without lokr_w2_b"),
    ({"down": (4, 6), "up": (8, 4), "lokr_w1": (2, 2)}, "it has down, lokr_w1, up and is LoRA and LoKr"),
    ({"alpha": (1,)}, "it has alpha and is none of LoRA, LoHa, LoKr"),
    ({"down": (4, 6), "up": (8, 4), "magnitude": (6,)}, "its magnitude has 6 numbers, for 8 rows and 6 columns"),
    ({"down": (4, 6), "up": (8, 4), "dora_scale": (1, 8)}, "its dora_scale has 8 numbers, for 8 rows and 6 columns"),
])
def test_tensors_that_do_not_fit_together_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        build({name: torch.ones(shape) for name, shape in fields.items()}, UNSTATED)


# ---------------------------------------------------------------- beside peft's layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(12, 16), nn.Conv2d(8, 16, 3, padding=1)


CONFIGS = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 2}),
    "rank-stabilised": ("LoraConfig", {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "loha in Tucker's form": ("LoHaConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 2}),
    "lokr of whole factors": ("LoKrConfig", {"r": 8, "alpha": 3, "decompose_factor": 2}),
    "lokr in Tucker's form": ("LoKrConfig", {"r": 1, "alpha": 3, "use_effective_conv2d": True, "decompose_factor": 2}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_changes_weights_as_peft_does(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from tinyldm.adapters.files import read_layers
    name, options = CONFIGS[kind]
    torch.manual_seed(3)
    base = Net()
    weights = {layer: getattr(base, layer).weight.detach().clone() for layer in ("linear", "conv")}
    wrapped = peft.get_peft_model(base, getattr(peft, name)(**options, target_modules=["linear", "conv"]))
    with torch.no_grad():
        for field, p in wrapped.named_parameters():
            if p.requires_grad:
                p.copy_(1 + p.abs() if "magnitude" in field else torch.randn_like(p))
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload()
    file = read_layers(tmp_path)
    for layer, weight in weights.items():
        name = f"base_model.model.{layer}"
        found = build(file.layers[name], file.scale(name)).delta(weight).view(weight.shape)
        assert found.abs().max() > 0.1
        assert torch.allclose(weight + found, getattr(merged, layer).weight, atol=1e-5), layer


def test_a_linear_layer_stored_as_a_convolution_changes_the_same_weight():
    change = LowRank(random(2, 6, 1, 1), random(8, 2, 1, 1), 0.5)
    linear = change.like((8, 6))
    assert torch.equal(linear.delta(), change.delta().flatten(1)) and linear.like((8, 6, 1, 1)).shape == (8, 6, 1, 1)
