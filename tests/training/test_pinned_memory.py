"""Host memory for checkpoints on a GPU, which is pretended here."""

import pytest
import torch
from pretend_gpu import PretendGpu
from safetensors.torch import load_file

from tinyldm.pinned_memory import PinnedMemory
from tinyldm.training.checkpoint import Writer, host_copy, save_tensors

SHAPES = {"matrix": (300, 129), "scalar": (), "empty": (0, 4), "large": (700, 900), "vector": (5,)}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 tensors of several sizes, then one each of other dtypes, and one in channels_last."""
    rng = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    made |= {str(dtype): torch.randn(7, generator=rng).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.int8, torch.bool)}
    return made | {"channels_last": torch.randn(2, 3, 4, 5, generator=rng).to(memory_format=torch.channels_last)}


def blocks(memory: PinnedMemory) -> list[int]:
    return [len(block) for block in memory.blocks]


@pytest.fixture
def refusing(monkeypatch):
    """A function after which only so many bytes of pinned memory are granted -> the sizes that were asked for."""
    real, asked = torch.empty, []

    def refuse(granted: int) -> list[int]:
        def empty(*size, **options):
            if options.get("pin_memory"):
                asked.append(size[0])
                if sum(asked) > granted:
                    raise RuntimeError("CUDA error: out of memory\nmore lines")
            return real(*size, **options)
        monkeypatch.setattr(torch, "empty", empty)
        return asked

    return refuse


def test_copies_from_a_gpu_lie_in_pinned_memory_and_are_waited_for_once():
    expected = tensors()
    with PretendGpu() as gpu:
        on_gpu = {name: tensor.to("cuda") for name, tensor in expected.items()}
        begun = len(gpu.events)
        copies = host_copy(on_gpu)
        assert sum(gpu.waits(begun).values()) == 1 and not gpu.mixed
        for name, copy in copies.items():
            assert copy.is_pinned() and copy.device.type == "cpu" and copy.is_contiguous() and copy.dtype == expected[name].dtype
        for tensor in on_gpu.values():
            tensor.zero_()
    assert all(torch.equal(copies[name], expected[name]) for name in expected) and copies.keys() == expected.keys()


def test_a_writers_copies_reuse_the_memory_of_the_checkpoint_before(tmp_path):
    writer, places = Writer(tmp_path, keep=1), []
    with PretendGpu():
        for seed in range(3):
            copy = writer.copier()
            found = [copy({name: tensor.to("cuda") for name, tensor in tensors(seed + part).items()}) for part in (0, 10, 20)]
            for part, copies in zip((0, 10, 20), found):       # the later calls have left the earlier ones as they were
                assert all(torch.equal(copies[name], tensor) for name, tensor in tensors(seed + part).items())
            places.append(([tensor.data_ptr() for copies in found for tensor in copies.values()], blocks(writer.memory)))
    assert places[0] == places[1] == places[2]


def test_memory_is_not_used_again_before_the_write_is_done(tmp_path):
    with PretendGpu():
        writer, read = Writer(tmp_path, keep=1), []
        copies = writer.copier()({"x": torch.ones(4).to("cuda")})
        writer.save("step", 1, lambda folder: read.append(copies["x"].tolist()), {})
        copy = writer.copier()
        assert read == [[1.0] * 4] and writer.pending is None
        copy({"x": torch.zeros(4).to("cuda")})
    writer.close()


def test_copies_that_share_a_block_are_saved_as_they_are(tmp_path):
    with PretendGpu():
        copies = host_copy({name: tensor.to("cuda") for name, tensor in tensors().items()})
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) < len(copies)
    save_tensors(tmp_path / "file", copies)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors().keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_many_tensors_take_little_more_memory_than_they_have_and_blocks_are_not_rounded_up(monkeypatch):
    monkeypatch.setattr(PinnedMemory, "BLOCK", 2**23)
    sizes, memory = [round(1.1 * 2**(10 + i % 10)) for i in range(500)], PinnedMemory()         # each rounded up: 1.8 times as much
    with PretendGpu():
        copies = [memory.empty_like(torch.empty(size, dtype=torch.uint8)).fill_(i % 251) for i, size in enumerate(sizes)]
    assert sum(sizes) <= sum(blocks(memory)) < sum(sizes) + 2**23 and sum(memory.used) < 1.01 * sum(sizes)
    assert blocks(memory) == [2**20, 2**21, 2**22] + [2**23] * (len(memory.blocks) - 3)
    assert all(len(copy) == size and bool((copy == i % 251).all()) for i, (copy, size) in enumerate(zip(copies, sizes)))


def test_a_tensor_larger_than_a_block_gets_one_of_its_own(monkeypatch):
    monkeypatch.setattr(PinnedMemory, "BLOCK", 2**20)
    memory, sizes = PinnedMemory(), [10, 3 * 2**20, 2**20, 10]
    with PretendGpu():
        assert [len(memory.empty_like(torch.empty(n, dtype=torch.uint8))) for n in sizes] == sizes
    assert blocks(memory) == [2**20, 2**22] and memory.used == [128, 2**22]                     # the third fills the rest of the second


@pytest.mark.parametrize("granted, pinned", [(0, 0), (2**20, 1), (2**30, 2)])
def test_where_pinned_memory_is_refused_ordinary_memory_takes_its_place_and_is_said_once(refusing, capsys, granted, pinned):
    asked, memory = refusing(granted), PinnedMemory()
    with PretendGpu():
        for seed in (0, 1):
            memory.clear()
            made = {f"{i}": torch.randn(150_000, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)}     # 0.6 MB each
            copies = host_copy({name: tensor.to("cuda") for name, tensor in made.items()}, memory=memory)
            assert all(torch.equal(copies[name], tensor) for name, tensor in made.items())
            assert sum(copy.is_pinned() for copy in copies.values()) == pinned
    out = capsys.readouterr().out
    assert out.count("no more pinned memory for checkpoints (CUDA error: out of memory more lines): ordinary memory") == (pinned < 2)
    assert len(asked) == pinned + (pinned < 2)                  # once refused, it is not asked for again


def test_on_a_cpu_nothing_is_pinned_and_nothing_kept(refusing, tmp_path):
    asked, writer = refusing(0), Writer(tmp_path, keep=1)
    copies = writer.copier()(tensors())
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors().items()) and not asked and not writer.memory.blocks
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values() if copy.numel()}) == len(copies) - 1     # no shared storage


def test_processes_that_write_nothing_allocate_nothing(refusing):
    asked, memory = refusing(0), PinnedMemory()
    with PretendGpu():
        assert host_copy({name: tensor.to("cuda") for name, tensor in tensors().items()}, False, memory) == {}
    assert not asked and not memory.blocks
