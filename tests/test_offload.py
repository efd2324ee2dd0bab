"""Models whose parts are on a GPU, pretended here, only while they work."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pretend_gpu
import pytest
import torch
from helpers import combinations, randomise
from pretend_gpu import GPU, PretendGpu, on_gpu
from small_models import MODELS, drawn, mmdit_model, unet_model

from tinyldm import offload as offloading
from tinyldm.diffusion.guidance import SkipLayers
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.model import Model, compile_blocks, repeated_blocks
from tinyldm.models.t5 import T5, T5Config
from tinyldm.offload import BlockByBlock, Loan, offload, pinned_weights, tensors_of, weight_bytes

FETCH = Loan.fetch


@pytest.fixture(params=MODELS)
def model(request) -> Model:
    made = MODELS[request.param]()
    for module in made.modules.values():
        module.requires_grad_(False)
    return made


def bytes_there(model: Model) -> dict[str, int]:
    """Bytes of weights on the GPU, of every part that has some there."""
    found = {part: sum(tensor.nbytes for tensor in tensors_of(module) if on_gpu(tensor)) for part, module in model.modules.items()}
    return {part: size for part, size in found.items() if size}


def blocks_there(model: Model) -> int:
    return sum(all(map(on_gpu, tensors_of(block))) for block in repeated_blocks(model.net))


@pytest.fixture
def watched(monkeypatch):
    """model -> a list, to which what is on the GPU is added after every fetch, when it is most."""
    def watch(model: Model) -> list[tuple[dict[str, int], int]]:
        seen = []

        def fetch(loan: Loan) -> None:
            FETCH(loan)
            seen.append((bytes_there(model), blocks_there(model)))
        monkeypatch.setattr(Loan, "fetch", fetch)
        return seen
    return watch


# ---- what is where


@pytest.mark.parametrize("how", ["parts", "blocks"])
def test_only_the_part_that_works_is_on_the_gpu_and_the_picture_is_the_same_to_the_last_bit(model, watched, how):
    resident = drawn(model)
    with PretendGpu() as gpu:
        moved = offload(model, GPU, how)
        at_home, seen = [tensor.data_ptr() for module in model.modules.values() for tensor in tensors_of(module)], watched(moved)
        assert moved.device == GPU and bytes_there(moved) == {}
        for _ in range(2):                                      # the second time the order of the blocks is known
            assert np.array_equal(drawn(moved), resident)
            assert bytes_there(moved) == {} and not gpu.mixed
    assert at_home == [tensor.data_ptr() for module in model.modules.values() for tensor in tensors_of(module)]
    parts = [[*there] for there, _ in seen if there]
    assert all(len(part) == 1 for part in parts)
    turns = [part for part, before in zip(parts, [None, *parts]) if part != before]
    assert turns == [*([part] for part in model.text.modules), ["net"], ["vae"]] * 2

    sizes = {part: weight_bytes(module) for part, module in model.modules.items()}
    most = {part: max(there.get(part, 0) for there, _ in seen) for part in sizes}
    if how == "parts":
        assert most == sizes
        return
    largest = max(weight_bytes(block) for block in repeated_blocks(model.net))
    outside = sizes["net"] - sum(map(weight_bytes, repeated_blocks(model.net)))
    assert most | {"net": 0} == sizes | {"net": 0}                              # neither CLIP nor the VAE has repeated blocks
    assert outside + largest < most["net"] <= outside + 2 * largest < sizes["net"]
    assert max(blocks for _, blocks in seen) == 2


@pytest.mark.parametrize("how", ["parts", "blocks"])
def test_modules_keep_their_parameters_and_no_hooks_and_can_be_trained_afterwards(model, how):
    before = {name: p for part, module in model.modules.items() for name, p in module.named_parameters(part)}
    with PretendGpu():
        drawn(offload(model, GPU, how))
    after = {name: p for part, module in model.modules.items() for name, p in module.named_parameters(part)}
    assert before.keys() == after.keys() and all(before[name] is p and p.device.type == "cpu" for name, p in after.items())
    for module in (inner for part in model.modules.values() for inner in part.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    block = repeated_blocks(model.net)[-1].requires_grad_(True)
    sum(p.square().sum() for p in block.parameters()).backward()
    assert all(torch.equal(p.grad, 2 * p) for p in block.parameters())


@pytest.mark.parametrize("made, drawing", [(torch.inference_mode, torch.inference_mode), (torch.inference_mode, nullcontext),
                                           (nullcontext, torch.inference_mode)])
def test_a_model_is_made_and_drawn_with_in_inference_mode_and_outside(made, drawing):
    with made():
        model = unet_model()
    with drawing():
        resident = drawn(model)
        with PretendGpu():
            assert np.array_equal(drawn(offload(model, GPU, "blocks")), resident)


def test_t5_works_layer_by_layer():
    net = randomise(T5(T5Config(vocab_size=40, width=32, layers=5, heads=2, head_dim=16, mlp_width=64))).requires_grad_(False)
    ids = torch.tensor([[7, 9, 3, 1], [5, 1, 0, 0]])
    expected, most = net(ids).hidden, []
    with PretendGpu() as gpu:
        mover = BlockByBlock(net, repeated_blocks(net), GPU)
        watching = net.layers[2].register_forward_hook(
            lambda *_: most.append([all(map(on_gpu, tensors_of(layer))) for layer in net.layers]))
        with mover.at_work():
            found = net(ids.to(GPU)).hidden
        watching.remove()
        assert torch.equal(found.cpu(), expected) and not gpu.mixed
    assert most == [[False, False, True, False, False]]         # at the end of the third: the second is gone, the fourth not yet fetched


def test_on_the_cpu_there_is_nothing_to_move():
    model = unet_model()
    assert offload(model, torch.device("cpu"), "blocks") is model


# ---- the order of blocks


def fetched_too_late(monkeypatch) -> list:
    """The blocks that had to be waited for, because another one was expected."""
    late, before = [], BlockByBlock._before

    def watch(mover, block, inputs):
        if block not in mover.here:
            late.append(block)
        before(mover, block, inputs)
    monkeypatch.setattr(BlockByBlock, "_before", watch)
    return late


def test_the_order_of_a_u_nets_blocks_is_learned_in_the_first_step(monkeypatch):
    model, late = unet_model(), fetched_too_late(monkeypatch)
    with PretendGpu():
        moved = offload(model, GPU, "blocks")
        drawn(moved)
        assert len(late) > 1
        late.clear()
        drawn(moved)
        assert late == [repeated_blocks(model.net)[0]]          # the first of all steps


def test_skipped_layers_are_wrong_guesses_and_nothing_else(monkeypatch):
    model, late, skip = mmdit_model(), fetched_too_late(monkeypatch), SkipLayers((1, 2), start=0.0, stop=1.0)
    resident = drawn(model, skip=skip)
    with PretendGpu():
        assert np.array_equal(drawn(offload(model, GPU, "blocks"), skip=skip), resident)
    assert model.net.blocks[3] in late


# ---- pinned memory


@pytest.fixture
def folder(tmp_path):
    model = unet_model()
    save_model(tmp_path / "model", net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    return tmp_path / "model"


@pytest.mark.parametrize("how", ["parts", "blocks"])
def test_copies_from_pinned_memory_are_waited_for_by_nobody_and_all_others_are(folder, how):
    expected, kinds = drawn(load_model(folder)), []
    with PretendGpu() as gpu:
        for context in (pinned_weights(GPU), pinned_weights(torch.device("mps"))):
            with context:
                model = load_model(folder)
            assert {tensor.is_pinned() for module in model.modules.values() for tensor in tensors_of(module)} == {not kinds}
            begun = len(gpu.events)
            assert np.array_equal(drawn(offload(model, GPU, how)), expected)
            kinds.append({event.kind for event in gpu.events[begun:] if event.place.startswith("tinyldm/offload.py")})
    assert kinds == [{"upload"}, {"wait"}]


def test_where_no_memory_can_be_pinned_it_is_said_once_and_the_picture_is_the_same(folder, monkeypatch, capsys):
    def refuse(*size, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(*size, **options)
    expected = drawn(load_model(folder))
    monkeypatch.setattr("tinyldm.pinned_memory.torch", SimpleNamespace(empty=refuse, uint8=torch.uint8))
    with PretendGpu():
        with pinned_weights(GPU):
            model = load_model(folder)
        assert np.array_equal(drawn(offload(model, GPU, "blocks")), expected)
    out, err = capsys.readouterr()
    assert out == "" and err.count("no more pinned memory for the weights (CUDA error: out of memory): ordinary memory is used") == 1


# ---- faults


class Broken(Exception):
    pass


@pytest.mark.parametrize("part, how", combinations(2, ["text", "net", "vae"], ["parts", "blocks"]))
def test_an_error_in_the_middle_of_a_part_leaves_everything_at_home(model, how, part):
    inner = {"text": model.text.modules["text"].final_norm, "net": repeated_blocks(model.net)[2], "vae": model.vae.decoder.middle}[part]

    def fail(*_):
        raise Broken
    resident = drawn(model)
    with PretendGpu():
        moved = offload(model, GPU, how)
        hook = inner.register_forward_hook(fail)
        with pytest.raises(Broken):
            drawn(moved)
        hook.remove()
        assert bytes_there(moved) == {}
        assert not any(module._forward_pre_hooks for module in moved.net.modules())
        assert np.array_equal(drawn(moved), resident)


@pytest.mark.parametrize("how, copy", [("parts", 4), ("blocks", 4), ("blocks", 150), ("blocks", 170)])
def test_memory_that_runs_out_in_the_middle_of_a_copy_leaves_everything_at_home(how, copy, monkeypatch):
    model, count, move = mmdit_model(), 0, pretend_gpu.move

    def full(tensor):
        nonlocal count
        count += 1
        if count == copy:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(tensor)
    resident = drawn(model)
    with PretendGpu():
        moved = offload(model, GPU, how)
        monkeypatch.setattr(pretend_gpu, "move", full)
        with pytest.raises(torch.OutOfMemoryError):
            drawn(moved)
        assert bytes_there(moved) == {}
        assert np.array_equal(drawn(moved), resident)


def test_a_compiled_network_is_not_moved_by_blocks_but_as_a_whole():
    model = unet_model()
    compile_blocks(model.net)
    with PretendGpu():
        with pytest.raises(ValueError, match="UNet.*block by block: leave out --compile, or use --offload parts"):
            offload(model, GPU, "blocks")
        offload(model, GPU, "parts")
    later = unet_model()
    with PretendGpu():
        moved = offload(later, GPU, "blocks")
        later.net.compile()
        with pytest.raises(ValueError, match="compiled"), moved.at_work("net"):
            pass


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="'block'.*blocks"):
        offload(unet_model(), GPU, "block")


# ---- which way


def ways(model: Model) -> dict[str, str]:
    return {part: type(mover).__name__ for part, mover in model.placement.movers.items()}


def test_auto_moves_by_blocks_what_does_not_fit_as_a_whole():
    model = mmdit_model()
    size = weight_bytes(model.net)
    with PretendGpu():
        fits, does_not = (ways(offload(model, GPU, "auto", memory)) for memory in (size, size - 1))
        none = ways(offload(model, GPU, "auto", 0))
    assert fits == {"net": "Whole", "vae": "Whole", "text": "Whole", "text_2": "Whole"}
    assert does_not == none == fits | {"net": "BlockByBlock"}


def test_auto_leaves_a_quarter_of_the_free_memory_to_the_activations(monkeypatch):
    model = mmdit_model()
    for free, way in ((weight_bytes(model.net) * 4 // 3 + 4, "Whole"), (weight_bytes(model.net) * 4 // 3 - 4, "BlockByBlock")):
        monkeypatch.setattr(offloading, "free_memory", lambda device, free=free: free)
        with PretendGpu():
            assert ways(offload(model, GPU))["net"] == way


def test_free_memory_counts_what_torch_holds_and_does_not_use(monkeypatch):
    assert offloading.free_memory(torch.device("cpu")) is None
    with PretendGpu():
        for name, answer in {"mem_get_info": (5000, 9000), "memory_reserved": 700, "memory_allocated": 300}.items():
            monkeypatch.setattr(torch.cuda, name, lambda device=None, answer=answer: answer)
        assert offloading.free_memory(GPU) == 5400
