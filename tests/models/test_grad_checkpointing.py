"""Gradient checkpointing: the same gradients from fewer bytes."""

import contextlib
import copy
import re
import shutil

import pytest
import torch
from helpers import randomise
from torch.autograd.graph import saved_tensors_hooks

from tinyldm.models import layers
from tinyldm.models.dit import DiT, DiTBlock, DiTConfig
from tinyldm.models.flux import DoubleBlock, Flux, FluxConfig, SingleBlock
from tinyldm.models.convolutions import ResBlock
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import JointBlock, MMDiT, MMDiTConfig
from tinyldm.models.unet import SpatialTransformer, UNet, UNetConfig

NETWORKS = {
    "dit": lambda: DiT(DiTConfig(width=32, layers=3, heads=2, mlp_width=64, context_dim=12, time_dim=16)),
    "unet": lambda: UNet(UNetConfig(widths=(16, 32), depth=1, attention=(False, True), heads=(2, 2), context_dim=12, groups=8)),
    "sdxl": lambda: UNet(UNetConfig(widths=(16, 32), depth=1, attention=(False, True), heads=(2, 2), context_dim=12, groups=8,
                                    transformer_layers=(1, 2), pooled_dim=8)),
    "mmdit": lambda: MMDiT(MMDiTConfig(in_channels=4, out_channels=4, width=32, layers=3, heads=2, context_dim=12, pooled_dim=8,
                                       qk_norm=True, dual_layers=(0,), max_positions=8, sample_size=8)),
    "flux": lambda: Flux(FluxConfig(in_channels=4, out_channels=4, width=32, heads=2, double_layers=2, single_layers=2, context_dim=12,
                                    pooled_dim=8, guidance=True, rope_axes=(4, 6, 6))),
}
BLOCKS = {DiT: (DiTBlock,), UNet: (ResBlock, SpatialTransformer), MMDiT: (JointBlock,), Flux: (DoubleBlock, SingleBlock)}
UNUSED = r"blocks\.2\.text\.attn\.(to_q\.|q_norm\.)"      # of MMDiT: the queries of the text in the last block


@pytest.fixture(params=NETWORKS)
def pair(request):
    """The same network without and with gradient checkpointing."""
    torch.manual_seed(0)
    plain = randomise(NETWORKS[request.param]()).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.grad_checkpointing = True
    return plain, checkpointed


def inputs(masked=False):
    """The guidance is small, because FLUX takes the sine of a thousand times it: at 4000 a last bit of a frequency, which a compiler rounds
    otherwise, is 2e-4 of a phase."""
    rand = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    return rand(2, 4, 8, 8), torch.tensor([10.0, 900.0]), Cond(
        rand(2, 7, 12).requires_grad_(), mask if masked else None, rand(2, 8), {"sizes": 100 * rand(2, 6), "guidance": rand(2) / 8})


def gradients(net, masked=False, around=contextlib.nullcontext, call=None):
    """[the output, the gradient of the text features, the gradient of every parameter]"""
    net.zero_grad()
    x, t, cond = inputs(masked)
    with around():
        out = (net if call is None else call)(x, t, cond)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in net.named_parameters() if not re.match(UNUSED, name))
    return [out.detach(), cond.context.grad, *(p.grad for p in net.parameters())]


def kept(net):
    """Bytes that autograd holds after a forward pass: its saved tensors, and the inputs of checkpointed blocks."""
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x
        return x

    x, t, cond = inputs()
    with saved_tensors_hooks(pack, lambda x: x):
        out = net(x, t, cond)
    return sum(x.untyped_storage().nbytes() for x in held.values()), out


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_the_same_bit_for_bit(pair, masked):
    if masked and isinstance(pair[0], (MMDiT, Flux)):
        pytest.skip("they take no mask")
    plain, checkpointed = (gradients(net, masked) for net in pair)
    assert all(map(torch.equal, plain, checkpointed))


def test_outputs_and_gradients_are_the_same_under_autocast(pair):
    around = lambda: torch.autocast("cpu", torch.bfloat16)
    plain, checkpointed = (gradients(net, around=around) for net in pair)
    assert plain[0].dtype == torch.bfloat16
    assert all(map(torch.equal, plain, checkpointed))


def test_every_block_is_run_by_checkpoint_and_nothing_else(pair, monkeypatch):
    _, net = pair
    given = []
    monkeypatch.setattr(layers, "checkpoint", lambda block, *args, **kwargs: given.append(block) or block(*args))
    gradients(net)
    wanted = BLOCKS[type(net)]
    assert given and sorted(map(id, given)) == sorted(id(m) for m in net.modules() if isinstance(m, wanted))


def test_less_is_kept_for_the_backward_pass(pair):
    (plain, _), (checkpointed, _) = map(kept, pair)
    assert checkpointed < plain / 3


@pytest.mark.parametrize("how", ["eval", "no_grad", "off"])
def test_drawing_does_not_checkpoint(pair, how, monkeypatch):
    _, net = pair
    monkeypatch.setattr(layers, "checkpoint", lambda *args, **kwargs: pytest.fail("checkpointed"))
    if how == "eval":
        net.eval()
    if how == "off":
        net.grad_checkpointing = False
    with torch.set_grad_enabled(how != "no_grad"):
        net(*inputs())


def test_it_is_no_part_of_the_weights(pair):
    plain, checkpointed = pair
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    assert not any(make().grad_checkpointing for make in NETWORKS.values())


def same_compiled(pair, **options):
    plain, checkpointed = pair
    compiled = torch.compile(checkpointed, fullgraph=True, **options)
    for a, b in zip(gradients(plain), gradients(checkpointed, call=compiled)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("net", [
    lambda: DiT(DiTConfig(width=16, layers=1, heads=1, mlp_width=16, context_dim=12, time_dim=16)),
    lambda: UNet(UNetConfig(widths=(16,), depth=1, attention=(True,), heads=(2,), context_dim=12, groups=8))], ids=["dit", "unet"])
def test_a_compiler_s_graph_gives_the_same_gradients(net):
    """Traced and differentiated ahead of time, but run as it is: no compiler is needed."""
    plain = randomise(net()).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.grad_checkpointing = True
    same_compiled((plain, checkpointed), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
def test_compiled_gradients_are_the_same(pair):
    same_compiled(pair)
