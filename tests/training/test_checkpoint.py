"""Which checkpoints stay, optimizers that come back exactly, channels_last moments, host copies, room on the disk."""

import os
from collections import namedtuple

import pytest
import torch
from torch import nn

from tinyldm.config import OptimisationConfig
from tinyldm.training import checkpoint
from tinyldm.training.optim import make_optimizers


def trained(module: nn.Module, steps: int, optimizers: list) -> None:
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def small(memory_format=torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("layers", nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)))
    net.add_module("head", nn.Conv2d(4, 2, 1))
    return net.to(memory_format=memory_format)


def optimizers_of(parameters: dict[str, nn.Parameter], kind: str = "muon") -> list[torch.optim.Optimizer]:
    matrices = {name for name, p in parameters.items() if name.startswith("layers.") and p.ndim == 4}
    return make_optimizers(parameters, matrices, OptimisationConfig(optimizer=kind, lr=1e-2, muon_lr=1e-2, weight_decay=0.1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_restored_optimizers_continue_bit_for_bit(tmp_path, memory_format):
    one = small(memory_format)
    parameters = dict(one.named_parameters())
    optimizers = optimizers_of(parameters)
    trained(one, 3, optimizers)
    checkpoint.save_tensors(tmp_path / "o.safetensors", checkpoint.optimizer_tensors(optimizers, parameters))

    two = small(memory_format)
    two.load_state_dict(one.state_dict())
    restored = optimizers_of(dict(two.named_parameters()))
    checkpoint.load_optimizers(tmp_path / "o.safetensors", restored, dict(two.named_parameters()))
    trained(one, 3, optimizers)
    trained(two, 3, restored)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_a_foreign_optimizer_file_is_refused_with_its_name(tmp_path):
    one = small()
    parameters = dict(one.named_parameters())
    optimizers = optimizers_of(parameters, "adamw")
    trained(one, 1, optimizers)
    checkpoint.save_tensors(tmp_path / "o.safetensors", checkpoint.optimizer_tensors(optimizers, parameters))
    other = {"else": nn.Parameter(torch.zeros(3))}
    with pytest.raises(ValueError, match="o.safetensors"):
        checkpoint.load_optimizers(tmp_path / "o.safetensors", optimizers_of(other, "adamw"), other)


def test_older_checkpoints_name_the_one_block_of_a_u_net_s_transformer_without_a_number(tmp_path):
    build = lambda: nn.ModuleDict({"attentions": nn.ModuleList([nn.ModuleDict({"blocks": nn.ModuleList([nn.Conv2d(3, 2, 1)])})])})
    one, two = build(), build()
    own, named = ({f"net.middle.{name}": p for name, p in net.named_parameters()} for net in (one, two))
    old = {name.replace(".blocks.0.", ".block."): p for name, p in own.items()}
    assert sorted(old) == ["net.middle.attentions.0.block.bias", "net.middle.attentions.0.block.weight"]
    optimizers, restored = optimizers_of(own, "adamw"), optimizers_of(named, "adamw")
    trained(one["attentions"][0]["blocks"][0], 2, optimizers)
    checkpoint.save_tensors(tmp_path / "o.safetensors", checkpoint.optimizer_tensors(optimizers, old))
    checkpoint.load_optimizers(tmp_path / "o.safetensors", restored, named)
    before, after = checkpoint.optimizer_tensors(optimizers, own), checkpoint.optimizer_tensors(restored, named)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_older_checkpoints_of_the_first_stage_name_parameters_without_their_part(tmp_path):
    one, two = small(), small()
    bare, named = dict(one.named_parameters()), {f"vae.{name}": p for name, p in two.named_parameters()}
    optimizers, restored = optimizers_of(bare, "adamw"), optimizers_of(named, "adamw")
    trained(one, 2, optimizers)
    checkpoint.save_tensors(tmp_path / "o.safetensors", checkpoint.optimizer_tensors(optimizers, bare))
    checkpoint.load_optimizers(tmp_path / "o.safetensors", restored, named)
    before, after = checkpoint.optimizer_tensors(optimizers, bare), checkpoint.optimizer_tensors(restored, named)
    assert len(before) == 3 * len(bare) and all(torch.equal(after[f"vae.{name}"], value) for name, value in before.items())


def put(run, stage, step, word="x", keep=9, keep_every=0):
    return checkpoint.write(run, stage, step, lambda folder: (folder / "x").write_text(word), {"word": word}, keep, keep_every)


def found(run) -> list[str]:
    return [path.name for path in checkpoint.names(run)]


def test_the_newest_are_kept_and_both_stages_sort_in_their_order(tmp_path):
    for stage, step in (("vae", 900), ("step", 5), ("step", 40), ("step", 1000)):
        put(tmp_path, stage, step, keep=3)
    assert found(tmp_path) == ["step-000005", "step-000040", "step-001000"]
    assert checkpoint.read_state(checkpoint.names(tmp_path)[-1]) == {"stage": "step", "step": 1000, "word": "x"}
    put(tmp_path, "step", 1234567, keep=2)                             # seven digits
    assert found(tmp_path) == ["step-001000", "step-1234567"]
    put(tmp_path, "step", 1234568, keep=0)
    assert found(tmp_path) == ["step-1234568"] == os.listdir(tmp_path / "checkpoints")


def test_every_so_many_steps_one_stays_for_good(tmp_path):
    for step in range(10, 100, 10):
        put(tmp_path, "step", step, keep=2, keep_every=30)
    assert found(tmp_path) == ["step-000030", "step-000060", "step-000080", "step-000090"]


def test_a_run_that_went_back_keeps_what_it_writes_and_leaves_what_is_ahead(tmp_path):
    for step in (10, 20, 50, 60):
        put(tmp_path, "step", step)
    put(tmp_path, "step", 30, keep=2)
    assert found(tmp_path) == ["step-000020", "step-000030", "step-000050", "step-000060"]
    put(tmp_path, "step", 55, keep=2)
    assert found(tmp_path) == ["step-000050", "step-000055", "step-000060"]


def test_a_failure_while_writing_leaves_the_older_checkpoints_and_no_torso(tmp_path):
    put(tmp_path, "step", 1, "one")

    def disk_full(folder):
        (folder / "y").write_text("half")
        raise OSError(28, "No space left on device")

    for step in (1, 2):
        with pytest.raises(OSError):
            checkpoint.write(tmp_path, "step", step, disk_full, {}, keep=1)
        assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]
        assert (tmp_path / "checkpoints" / "step-000001" / "x").read_text() == "one"


def test_what_a_killed_process_left_is_removed_and_other_folders_are_not(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (".writing-step-000007", ".dropped-step-000005", "step-000006", "step-000006-copy", "step-best", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").touch()
    (folder / "step-000006-copy" / "state.json").touch()
    (folder / "step-best" / "state.json").touch()
    assert found(tmp_path) == []                                       # 6 is not finished: it has no state.json
    put(tmp_path, "step", 8, keep=1)
    assert sorted(os.listdir(folder)) == ["notes", "step-000006", "step-000006-copy", "step-000008", "step-best"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_a_host_copy_is_contiguous_and_keeps_its_values_when_the_original_changes(device):
    originals = {"plain": torch.arange(6.0), "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                 "part": torch.arange(9)[::2], "scalar": torch.tensor(7.0), "bf16": nn.Parameter(torch.ones(3).bfloat16())}
    originals = {name: tensor.to(device) for name, tensor in originals.items()}
    expected = {name: tensor.tolist() for name, tensor in originals.items()}
    copies = checkpoint.host_copy(originals)
    with torch.no_grad():
        for tensor in originals.values():
            tensor.zero_()
    assert {name: copy.tolist() for name, copy in copies.items()} == expected
    for name, copy in copies.items():
        assert copy.device.type == "cpu" and copy.is_contiguous() and not copy.requires_grad
        assert copy.dtype == originals[name].dtype and copy.is_pinned() == (device == "cuda")


def test_a_copy_of_the_optimizers_is_what_is_saved(tmp_path):
    one = small(torch.channels_last)
    parameters = dict(one.named_parameters())
    optimizers = optimizers_of(parameters)
    trained(one, 2, optimizers)
    checkpoint.save_tensors(tmp_path / "one", checkpoint.optimizer_tensors(optimizers, parameters))
    copy = checkpoint.host_copy(checkpoint.optimizer_tensors(optimizers, parameters))
    trained(one, 1, optimizers)
    checkpoint.save_tensors(tmp_path / "two", copy)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "layers.0.weight/momentum_buffer" in copy and "head.weight/exp_avg" in copy


def test_too_little_room_for_the_next_checkpoints_is_told_with_both_sizes(tmp_path, monkeypatch):
    asked = []
    usage = lambda place: asked.append(place) or namedtuple("usage", "total used free")(0, 0, 10_000_000_000)
    monkeypatch.setattr("shutil.disk_usage", usage)
    run = tmp_path / "not" / "there"
    checkpoint.check_room(run, 5_000_000_000)
    checkpoint.check_room(run, 3_333_333_333, checkpoints=3)
    with pytest.raises(OSError, match="10.0 GB are free for .*there.checkpoints, and the next 2 checkpoints need 12.0 GB: make room"):
        checkpoint.check_room(run, 6_000_000_000)
    assert set(asked) == {tmp_path}
    run.mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")        # the room on that disk counts
    checkpoint.check_room(run, 5_000_000_000)
    assert asked[-1].samefile(tmp_path / "disk")


def test_a_file_with_several_names_is_read_once_for_all_checkpoints_and_damage_to_it_is_found(tmp_path, monkeypatch):
    (tmp_path / "frozen").write_text("as it was")
    read, sha256 = [], checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda file: read.append(file.name) or sha256(file))
    fill = lambda folder: (os.link(tmp_path / "frozen", folder / "frozen"), (folder / "own").write_text("x"))
    first, second = (checkpoint.write(tmp_path, "step", step, fill, {}, keep=9) for step in (1, 2))
    assert read == ["frozen", "own", "own"] and checkpoint._read(first)["files"] == checkpoint._read(second)["files"]
    assert checkpoint.find_damage(second) == ""
    times = (tmp_path / "frozen").stat()
    (tmp_path / "frozen").write_text("As it was")              # as a disk loses a bit, without a new time of change
    os.utime(tmp_path / "frozen", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert checkpoint.find_damage(checkpoint.write(tmp_path, "step", 3, fill, {}, keep=9)) == "frozen has changed since it was written"
