"""T5's encoder against transformers', live: random weights of unit gain, and a position bias that matters."""

from dataclasses import replace

import pytest
import torch
import transformers
from helpers import randomise

from tinyldm.folders.rename import export_renamed
from tinyldm.models.t5 import T5, T5Config, bucket
from tinyldm.vendor_loaders import t5

CONFIG = T5Config(vocab_size=100, width=48, layers=3, heads=4, head_dim=8, mlp_width=64, norm_eps=1e-3)       # 1e-6 hardly shows
CONFIGS = pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, gated=False)], ids=["v1.1", "original"])


@torch.no_grad()
def build(config=CONFIG, seed=0):
    net = randomise(T5(config), seed)
    net.token_embedding.weight *= config.width**0.5
    net.position_bias.weight.normal_(0, 2, generator=torch.Generator().manual_seed(seed))
    return net


def peer(net, dtype=torch.float32, **options):
    """transformers' encoder with the same weights."""
    theirs = transformers.T5EncoderModel(transformers.T5Config(**t5.to_config(net.config), **options)).to(dtype).eval()
    weights = export_renamed(net.state_dict(), t5.LAYOUTS["transformers"].rules(net.config))
    assert theirs.load_state_dict(weights, strict=False).missing_keys == ["encoder.embed_tokens.weight"]       # tied to shared.weight
    return theirs


def captions(n, b=3):
    """Rows of ids that end at different places, </s> before padding with 0; the last row fills the context."""
    ids = torch.randint(2, 100, (b, n), generator=torch.Generator().manual_seed(n))
    for row, end in enumerate((n // 4, n // 2, n - 1)):
        ids[row, end], ids[row, end + 1:] = 1, 0
    return ids


def ends_mask(net, ids):
    return torch.arange(ids.shape[1]) <= net.ends(ids)[:, None]


def relative(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
@CONFIGS
@pytest.mark.parametrize("n", [5, 77, 512])
@pytest.mark.parametrize("masked", [False, True])
def test_every_layer_equals_transformers(config, n, masked):
    net = build(config)
    states = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    ids = captions(n)
    mask = ends_mask(net, ids) if masked else None
    ours, theirs = net(ids, mask), peer(net)(ids, None if mask is None else mask.long(), output_hidden_states=True)
    expected = theirs.hidden_states                     # of the embedding, then of each layer; the last one is normalised
    assert len(states) == config.layers == len(expected) - 1
    for state, other in zip(states[:-1], expected[1:]):
        assert relative(state, other) < 1e-5
    assert relative(ours.hidden, theirs.last_hidden_state) < 1e-5
    for row, end in enumerate((n // 4, n // 2, n - 1)):
        assert torch.equal(ours.pooled[row], ours.hidden[row, end])


@torch.no_grad()
def test_a_mask_makes_features_independent_of_the_padding_even_of_a_row_that_is_empty():
    net, ids = build(), captions(40)
    mask = ends_mask(net, ids)
    assert relative(net(ids, mask).hidden[0, :11], net(ids[:1, :11]).hidden[0]) < 1e-5
    assert relative(net(ids).hidden[0, :11], net(ids[:1, :11]).hidden[0]) > 1e-2
    assert torch.isfinite(net(ids, torch.zeros_like(mask)).hidden).all()


def test_buckets_are_those_of_mesh_tensorflow_and_the_second_half_is_for_keys_behind_the_query():
    offsets = torch.arange(-600, 601)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    for buckets, distance in ((32, 128), (8, 20), (32, 200)):
        assert torch.equal(bucket(offsets, buckets, distance), theirs(offsets, True, buckets, distance))
    assert bucket(torch.tensor([0, -1, 1, -7, 7, -8, 8, -16, 16, -127, 127, -128, 500]), 32, 128).tolist() == [
        0, 1, 17, 7, 23, 8, 24, 10, 26, 15, 31, 15, 31]


@torch.no_grad()
def test_the_bias_of_a_pair_is_that_of_the_keys_position_minus_the_querys():
    net = build()
    bias = net.bias(6)
    assert bias.shape == (1, 4, 6, 6)
    for query, key in ((0, 5), (5, 0), (2, 3), (4, 4)):
        row = bucket(torch.tensor([key - query]), 32, 128)[0]
        assert torch.equal(bias[0, :, query, key], net.position_bias.weight[row])


@torch.no_grad()
@CONFIGS
def test_in_bfloat16_features_are_near_those_of_float32_and_not_further_than_transformers(config):
    net = build(config)
    ids = captions(77)
    exact, theirs = net(ids).hidden, peer(net, torch.bfloat16)(ids).last_hidden_state
    ours = net.bfloat16()(ids)
    assert ours.hidden.dtype == ours.pooled.dtype == torch.bfloat16
    error, other = (((x.float() - exact).norm() / exact.norm()).item() for x in (ours.hidden, theirs))
    assert error < 0.05 and error < 1.2 * other


@torch.no_grad()
@CONFIGS
def test_float16_survives_features_beyond_its_largest_number(config):
    """As in published weights, one feature of the residual stream is huge: here 2e5 after the first MLP."""
    net = build(config)
    net.layers[0].fc2.weight[7] *= 1.2e5
    ids, states = captions(77), []
    net.layers[0].register_forward_hook(lambda module, inputs, output: states.append(output))
    half = T5(config).half().eval()
    half.load_state_dict({name: weight.half() for name, weight in net.state_dict().items()})
    half.layers[0].register_forward_hook(lambda module, inputs, output: states.append(output))
    exact, found = net(ids).hidden, half(ids).hidden
    assert states[0].abs().max() > 2 * 65504 and found.dtype == torch.float16
    assert torch.isfinite(states[1]).all() and relative(states[1], states[0]) < 5e-3
    assert torch.isfinite(found).all() and ((found.float() - exact).norm() / exact.norm()).item() < 2e-2


@CONFIGS
def test_gradients_reach_every_parameter(config):
    net = build(config)
    net(captions(20)).hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@torch.no_grad()
@CONFIGS
def test_initial_weights_have_the_scales_of_transformers(config):
    config = replace(config, width=256, heads=8, head_dim=64, mlp_width=512, vocab_size=400)
    torch.manual_seed(0)
    ours = export_renamed(T5(config).state_dict(), t5.LAYOUTS["transformers"].rules(config))
    theirs = transformers.T5EncoderModel(transformers.T5Config(**t5.to_config(config))).state_dict()
    for name, weight in ours.items():
        few = weight.numel() < 1000
        assert weight.std(unbiased=False).item() == pytest.approx(theirs[name].std(unbiased=False).item(), rel=0.3 if few else 0.05), name


def test_the_default_config_is_the_encoder_of_version_1_1_xxl():
    with torch.device("meta"):
        assert sum(p.numel() for p in T5(T5Config()).parameters()) == 4_762_310_656


def test_errors_say_what_to_do():
    for field, value in (("layers", 0), ("head_dim", -1), ("buckets", 2)):
        with pytest.raises(ValueError, match=field):
            replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match="use more than 8"):
        replace(CONFIG, max_distance=8)
