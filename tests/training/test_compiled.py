"""What torch.compile makes of the networks of a run: how many graphs, of which shapes and operations."""

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import SMALL, load_script, pictures, thinned, train_here, weights
from PIL import Image
from small_models import unet_model
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from tinyldm.config import parse
from tinyldm.folders.save import save_loaded
from tinyldm.model import architecture, compile_blocks, repeated_blocks
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.convolutions import Upsample
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.training import second_stage
from tinyldm.training.log import read

NETS = {"unet": lambda: UNet(UNetConfig(widths=(16, 32), depth=1, attention=(False, True), heads=(1, 2), context_dim=8, groups=8)),
        "dit": lambda: DiT(DiTConfig(patch=2, width=16, layers=2, heads=2, mlp_width=32, context_dim=8, time_dim=8))}


class Graphs:
    """A backend of torch.compile that notes every graph and every call of one."""

    def __init__(self):
        self.made, self.called = [], []                        # (kind, is dynamic, operations); index into made

    def compiler(self, kind):
        def compile(graph, inputs):
            dynamic = any(isinstance(size, torch.SymInt) for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else (x,)))
            self.made.append((kind, dynamic, [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]))
            index, forward = len(self.made) - 1, make_boxed_func(graph.forward)

            def call(inputs):
                self.called.append(index)
                return forward(inputs)

            call._boxed_call = True
            return call
        return compile

    def backend(self):
        return aot_autograd(fw_compiler=self.compiler("forward"), bw_compiler=self.compiler("backward"),
                            inference_compiler=self.compiler("inference"))


@pytest.fixture
def graphs(monkeypatch):
    torch.compiler.reset()
    counters.clear()
    found, real = Graphs(), torch.compile
    backend = found.backend()                                   # one for all: another one is another graph
    monkeypatch.setattr(torch, "compile", lambda net, dynamic=None, options=None: real(net, dynamic=dynamic, backend=backend))
    yield found
    torch.compiler.reset()


# 8 samples in 3 micro-batches: 3, 3 and 2. Two samples are held out. The grid is drawn with the network itself.
RUN = [*SMALL, "--batch-size", "8", "--grad-accum", "3", "--val-samples", "2", "--val-every", "2", "--stages", "16=0.5", "32=0.5",
       "--max-steps", "4", "--vae-steps", "1", "--sample-steps", "1"]


@pytest.mark.parametrize("network", ["dit", "unet"])
@pytest.mark.slow
def test_a_run_of_two_picture_sizes_has_static_graphs_only_and_no_more_than_it_needs(network, graphs, tmp_path, monkeypatch):
    train = load_script("train")
    monkeypatch.setattr(train, "rehearse", lambda config, context, last: (config, []))
    words = [] if network == "unet" else ["--network", "dit", "--dit", "width=16", "layers=1", "heads=2", "mlp_width=32", "time_dim=8"]
    train_here(train, ["--out", str(tmp_path), *RUN, "--compile", *words], monkeypatch)
    assert not any(dynamic for _, dynamic, _ in graphs.made)
    kinds = [kind for kind, _, _ in graphs.made]
    # At 16 px micro-batches of 3 and 2, at 32 px of 1 (3 times 4 of them are more than 8); validation in one of 2, or two of 1.
    assert {kind: kinds.count(kind) for kind in kinds} == {"forward": 3, "backward": 3, "inference": 2}
    assert not counters["graph_break"]
    assert len([index for index in graphs.called if kinds[index] == "forward"]) == 2 * 3 + 2 * 8


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--train-text"], ["--lora-dropout", "0.5"], ["--grad-checkpointing"]],
                         ids=["net", "text", "dropout", "checkpointing"])
def test_an_adapter_trains_compiled_as_it_does_eager_by_one_graph(words, graphs, tmp_path, monkeypatch):
    """Sample grids with and without the adapter are drawn in between, which takes its hooks off the network and puts them back. (Compiled
    dropout draws other random numbers. With checkpointing the backward graph gets generators' states, of a size that it is not told.)"""
    train, base, model = load_script("train"), tmp_path / "base", unet_model()
    monkeypatch.setattr(train, "rehearse", lambda config, context, last: (config, []))
    save_loaded(base, model)
    data = pictures(tmp_path / "mine", 8, (16, 16))
    run = [*"--finetune lora --rank 2 --lr 0.05 --batch-size 4 --max-steps 6 --sample-every 2 --sample-steps 1 --log-every 1 --dtype fp32 "
           "--val-samples 0".split(), "--targets", "attention", "mlp", "conv", "--model", str(base), "--data", str(data), *words]
    for name in ("eager", "compiled"):
        train_here(train, ["--out", str(tmp_path / name), *run, f"--{'' if name == 'compiled' else 'no-'}compile"], monkeypatch)
    made = [kind for kind, _, _ in graphs.made]
    assert sorted(made) == ["backward", "forward"] and not counters["graph_break"]
    assert not any(dynamic for _, dynamic, _ in graphs.made) or "--grad-checkpointing" in words
    assert [made[index] for index in graphs.called] == ["forward", "backward"] * 6
    if "--lora-dropout" in words:
        return
    eager, compiled = ([row["loss"] for row in read(tmp_path / name / "log.jsonl") if "loss" in row] for name in ("eager", "compiled"))
    assert len(eager) == 6 and compiled == pytest.approx(eager, rel=2e-5)
    one, two = (weights(tmp_path / name / "checkpoints" / "step-000006") for name in ("eager", "compiled"))
    assert one.keys() == two.keys()
    for name in (name for name in one if name.startswith("adapter.safetensors")):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=0.01 * 0.05)          # a hundredth of a step of Adam's
    for name in ("before.png", "step-000006.png"):
        pixels = [np.asarray(Image.open(tmp_path / run / "samples" / name)).astype(int) for run in ("eager", "compiled")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2, name


@pytest.mark.parametrize("network", thinned(2, sorted(NETS)))
def test_a_compiled_network_is_the_network_and_its_options_exist(network, graphs):
    net, x, t, cond = awake(NETS[network]()), torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), Cond(torch.randn(2, 5, 8))
    compiled = second_stage.compile_network(net, parse([], "", {})[0])
    torch.testing.assert_close(compiled(x, t, cond), net(x, t, cond), rtol=1e-6, atol=1e-6)
    assert len(graphs.called) == 1 and set(architecture(net).compile_options) <= set(torch._inductor.list_options())


# In the U-Net: ResBlocks of 16 channels, 16 to 32, and 32 in the middle; on the way up 64 to 32, 48 to 32, 48 to 16, 32 to 16; and
# transformers of 32 channels.
@pytest.mark.parametrize("network, kinds", [("dit", 1), pytest.param("unet", 7 + 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointed", thinned(2, [True, False]))
def test_blocks_of_equal_shapes_are_compiled_once_and_the_network_answers_the_same(network, kinds, checkpointed, graphs):
    net, x, t, cond = awake(NETS[network]()), torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), Cond(torch.randn(2, 5, 8))
    net.grad_checkpointing = checkpointed
    expected = net(x, t, cond)
    gradients = torch.autograd.grad(expected.square().sum(), [*net.parameters()])
    found = compile_blocks(net)(x, t, cond)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), [*net.parameters()]), gradients, rtol=1e-4, atol=1e-5)
    made = [kind for kind, _, _ in graphs.made]
    assert (made.count("forward"), made.count("backward")) == (kinds, kinds)
    repeats = 2 if checkpointed else 1
    assert len([index for index in graphs.called if made[index] == "forward"]) == repeats * len(repeated_blocks(net))


def awake(net):
    """The network with random weights where it has zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", pytest.param("dit", marks=pytest.mark.slow)])
def test_the_backward_pass_of_a_compiled_network_adds_nothing_by_index(network, graphs):
    """index_put and index_add add in any order on CUDA, so gradients would differ from run to run."""
    net = awake(NETS[network]())
    torch.compile(net)(torch.randn(2, 4, 8, 8), torch.ones(2), Cond(torch.randn(2, 5, 8))).square().sum().backward()
    (_, _, forward), (_, _, backward) = graphs.made
    assert not [name for name in backward if "index" in name or "scatter" in name]
    assert any("convolution" in name or "mm" in name for name in forward)


def test_upsampling_repeats_every_pixel_the_same_compiled_or_not(graphs):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    layer = Upsample(3)
    plain = layer(x)
    grad, = torch.autograd.grad(plain.square().sum(), x)
    compiled = torch.compile(layer)(x)
    assert torch.equal(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), x)[0], grad)
    assert torch.equal(layer.conv(x.detach().repeat_interleave(2, 2).repeat_interleave(2, 3)), plain)
