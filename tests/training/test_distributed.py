import json
import socket
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ENVIRONMENT, ROOT, SMALL, load_script, thinned, train_here
from safetensors.torch import load_file, save_file
from torch import nn
from workers import BATCH, STEPS, Run

from tinyldm.model import muon_matrices
from tinyldm.training import checkpoint, distributed
from tinyldm.training.distributed import World, clip, connect, launched, load_whole, shard, whole
from tinyldm.training.packing import buckets

KINDS = ("dit", "unet")
GONE = "another of the {} processes has ended (its own message says why): start them again with --resume yes"


def launch(size, folder):
    """As torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ENVIRONMENT | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONFAULTHANDLER": "1"}
    return [subprocess.Popen([sys.executable, ROOT / "tests" / "workers.py", folder], env=common | {"RANK": str(rank)})
            for rank in range(size)]


class Trained:
    """What one process came to, and what several did."""

    def __init__(self, size, folder):
        self.size, self.folder = size, folder
        self.runs = {kind: Run(kind, World()) for kind in KINDS}
        save_file(self.runs["dit"].steps(last=2).tensors(), folder / "single.safetensors")
        processes = launch(size, folder)
        try:
            self.runs["dit"].steps(2), self.runs["unet"].steps()
            self.ends = [process.wait(100) for process in processes]
        finally:
            for process in processes:
                process.kill()
        self.said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]

    def of(self, name):
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("some of these networks are sharded, which needs torch 2.8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Trained(request.param, tmp_path_factory.mktemp("trained"))
    torch.set_num_threads(threads)


def near(found, wanted, tolerance):
    """Nowhere further apart than a share of each tensor's largest entry (or, where all is about 0, of 1e-3)."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = max(float(tensor.abs().max()), 1e-3)
        assert float((found[name].double() - tensor.double()).abs().max()) <= tolerance * scale, name


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("name, kind", thinned(3, [("dit", "dit"), ("unet", "unet"), ("sharded", "dit"), ("sharded-unet", "unet")]))
def test_gradients_add_up_to_those_of_one_process(trained, name, kind):
    near(trained.of(f"{name}-gradients"), trained.runs[kind].gradients, 1e-5)


@pytest.mark.parametrize("name, kind", [("dit", "dit"), ("unet", "unet"), ("sharded", "dit")])
def test_weights_averages_moments_and_meter_are_those_of_one_process(trained, name, kind):
    found, wanted = trained.of(name), trained.runs[kind].tensors()
    near(found, wanted, 1e-3)                                  # Muon's bfloat16 makes much of the last bits
    assert found["meter"].tolist() == pytest.approx(wanted["meter"].tolist(), rel=1e-5)
    assert found["meter"][1] == BATCH * STEPS
    assert [said[f"{name}-norm"] for said in trained.said] == pytest.approx([trained.runs[kind].norm] * trained.size, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_hold_the_same_bits(trained, kind):
    assert len({said[kind] for said in trained.said}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_orthogonalised_by_one_process_and_the_work_is_shared_out_evenly(trained, kind):
    counts, matrices = [said[f"{kind}-orthogonalised"] for said in trained.said], len(muon_matrices(trained.runs[kind].modules))
    assert sum(counts) == STEPS * matrices and max(counts) - min(counts) <= STEPS


def test_a_sharded_network_computes_what_a_whole_one_does_under_autocast(trained):
    for kind in KINDS:
        assert torch.equal(trained.of(f"sharded-half-{kind}-output")["output"], Run(kind, World(), half=True).output())
    whole = Run("dit", World(), half=True).steps()
    near(trained.of("sharded-half-gradients"), whole.gradients, 0.02)                  # bfloat16, in parts of other sizes
    assert trained.said[0]["dtypes"] == ["torch.float32"]
    near(trained.of("sharded-half"), whole.tensors(), 0.1)


def test_no_process_keeps_whole_bfloat16_weights_of_a_sharded_network_for_the_backward_pass(trained):
    assert [said["whole weights"] for said in trained.said] == [0] * trained.size


def test_a_sharded_run_can_be_continued_by_one_process(trained):
    one = Run("dit", World(), seed=1).load(trained.of("sharded-halfway"), trained.folder).steps(2)
    near(one.tensors(), trained.of("sharded"), 3e-4)


def test_one_process_s_run_can_be_continued_sharded(trained):
    near(trained.of("resumed"), trained.runs["dit"].tensors(), 3e-4)


def test_each_process_holds_its_share_of_a_sharded_network(trained):
    held = [said["share"][0] for said in trained.said]
    assert sum(held) == trained.said[0]["share"][1] and max(held) < 1.2 * sum(held) / trained.size


@pytest.mark.parametrize("name, kind, steps", [("sharded", "dit", 3), ("sharded-unet", "unet", 1)])
def test_averages_can_be_applied_to_a_sharded_network_and_taken_off(trained, name, kind, steps):
    found, wanted = trained.of(f"{name}-outputs"), Run(kind, World()).steps(last=steps).outputs()
    near(found, wanted, 1e-3)
    assert (wanted["before"] - wanted["averaged"]).abs().max() > 0.005 and torch.equal(found["before"], found["after"])


def test_a_snapshot_of_a_sharded_network_is_whole(trained):
    assert all(said["snapshot"] for said in trained.said)


def test_only_who_writes_keeps_copies(trained):
    everything = len(trained.runs["dit"].tensors())
    assert [said["kept"] for said in trained.said] == [everything] + [0] * (trained.size - 1)


def test_resblocks_and_transformers_of_a_unet_are_sharded_one_by_one(trained):
    own = [f"{part}.{block}.0" for part in ("down.0", "middle", "up.1") for block in ("resnets", "attentions")]
    found = set(trained.said[0]["blocks"])
    assert {"", *own, "middle.resnets.1", "up.0.resnets.1"} <= found
    assert all(not name or name.split(".")[-2] in ("resnets", "attentions") for name in found)


# ---------------------------------------------------------------- messages


def test_maxima_broadcasts_and_barriers(trained):
    for said in trained.said:
        assert said["maxima"] == [trained.size - 1, 0, 2**53 - 1] and said["maxima of nothing"] == []
        assert said["broadcast"] == {"é": [1, None], "rank": 0} and said["waited"]


def test_sums_of_all_dtypes_shapes_and_layouts(trained):
    size, total = trained.size, trained.size * (trained.size + 1) / 2
    for said in trained.said:
        transposed, scalar, none, integers, image, halves, weights = said["sums"]
        assert transposed == [[total] * 5] * 3 and scalar == size and none == []
        assert integers == [size * 2**40] * 3 and halves == [size] * 40 and weights == [size, size]
        assert image == (size * torch.arange(24.0).view(1, 2, 3, 4)).tolist()
        assert said["strides"][0] == [1, 3] and said["strides"][4] == [24, 1, 8, 2]


def test_tensor_i_is_shared_by_process_i_and_rank_0_s_are_broadcast(trained):
    values = [i % trained.size + 0.5 for i in range(5)]
    for said in trained.said:
        assert said["shared"] == [[[values[0]] * 5] * 3, [[values[1]] * 3] * 2, [values[2]] * 4, [], [values[4]] * 7, [0.5] * 2]
        assert said["first"] == [[[1.0] * 3] * 4, True, True]


def test_gradients_summed_in_bfloat16_are_half_the_bytes_and_right_to_8_bits_and_losses_stay_exact(trained):
    draws = [torch.randn(20, 30, generator=torch.Generator().manual_seed(rank)).double() for rank in range(trained.size)]
    for said in trained.said:
        assert sorted(said["sent"]) == [4 * 19, 2 * 620]       # losses in float32; 620 gradients
        weight, bias = map(torch.tensor, said["summed"])
        assert bias.tolist() == [trained.size * (trained.size + 1) / 2] * 20
        error = (weight.view(20, 30) - sum(draws)).abs() / sum(draw.abs() for draw in draws)
        assert 2**-12 < error.max() < 2**-9 + (trained.size - 1) * 2**-8               # gloo rounds its sums towards 0
        assert said["pending"] == pytest.approx([trained.size / 3] * 19, rel=1e-7)
    assert trained.said[0]["summed"] == trained.said[-1]["summed"]


def test_processes_begin_with_rank_0_s_weights_averages_and_moments(trained):
    for said in trained.said:
        assert "hold different weights" in said["at first"] and said["made equal"] is None
    assert len({said["equal"] for said in trained.said}) == 1


def test_one_bit_of_difference_between_the_processes_weights_stops_the_run_before_it_is_saved(trained):
    for said in trained.said:
        assert said["unequal"].startswith(f"after step 7 the {trained.size} processes hold different weights, so no checkpoint was "
                                          "written: continue from the last one with --resume yes")
        assert said["written"] == []


def test_who_is_left_alone_says_so(trained):
    ways = ("sum", "all_reduce_max", "broadcast", "barrier", "forward") if trained.size == 2 else ("sum",)
    assert trained.ends == [0] * (trained.size - 1) + [1]
    for said in trained.said[:-1]:
        assert [said[f"{way} alone"] for way in ways] == [GONE.format(trained.size)] * len(ways)


# ---------------------------------------------------------------- without other processes


def test_a_process_on_its_own_changes_nothing():
    world, tensor, value, net = World(), torch.ones(3), {"any": (1, 2)}, nn.Linear(2, 2)
    before = list(net.parameters())
    world.sum([tensor]), world.barrier(), world.close(), shard(net, world)
    assert world.all_reduce_max(1, 2.5) == [1.0, 2.5] and world.broadcast(value) is value and tensor.tolist() == [1, 1, 1]
    assert world.main and all(a is b for a, b in zip(before, net.parameters())) and whole(tensor) is tensor


def test_only_rank_0_is_the_main_process():
    assert [World(rank, 3).main for rank in range(3)] == [True, False, False]


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), World(0, 3).peer_errors():
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="gloo/"), World().peer_errors():
        raise RuntimeError("[third_party/gloo/pair.cc:1] Connection closed by peer")
    with pytest.raises(ValueError, match="another of the 3 processes has ended"), World(0, 3).peer_errors():
        raise dist.DistBackendError("NCCL communicator was aborted")


def test_buckets_are_filled_in_order_by_dtype():
    half = torch.empty(1024 // 8)                              # of a bucket
    small, number, large = torch.empty(2), torch.empty(3, dtype=torch.int64), torch.empty(1024 // 4 + 1)
    found = buckets([half, number, half, small, large, small, number], 1024)
    assert [[tensor.numel() for tensor in bucket] for bucket in found] == [
        [half.numel()] * 2, [small.numel()], [large.numel()], [2], [3, 3]]
    assert buckets([], 1024) == []


def test_torchrun_s_environment_is_understood(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    assert launched() == (0, 1)                                # some cluster's, not torchrun's
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (2, 4)


def test_one_process_of_torchrun_needs_no_group(monkeypatch):
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
    assert connect(torch.device("mps")).size == 1 and not dist.is_initialized()


def test_only_the_launch_that_began_a_run_goes_on_with_it_by_itself(tmp_path, monkeypatch):
    assert distributed.launch() == "" and not distributed.started_again(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    (tmp_path / "launch").write_text(distributed.launch())
    assert not distributed.started_again(tmp_path)             # the first attempt
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.started_again(tmp_path) and not distributed.started_again(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not distributed.started_again(tmp_path)
    (tmp_path / "launch").write_text("another 1")              # the same name, another parent: on process 0's host that is another
    assert not distributed.started_again(tmp_path)


@pytest.mark.parametrize("device, gpus, says", [("mps", 0, "cannot train together on mps"), ("cuda", 1, "--nproc-per-node 1"),
                                                ("cuda:0", 2, "a GPU of its own")])
def test_devices_that_cannot_be_shared_are_refused(monkeypatch, device, gpus, says):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=says):
        connect(torch.device(device))


class Group:
    """A process group of NCCL and gloo."""

    def __init__(self):
        self.limits = {}

    def _get_backend(self, device):
        return SimpleNamespace(_set_default_timeout=lambda limit: self.limits.update({device.type: limit}))


@pytest.mark.parametrize("nccl", [True, False])
def test_nccl_waits_ten_minutes_and_gloo_an_hour_and_only_gloo_alone_is_left_at_exit(monkeypatch, nccl):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    group, begun, at_exit = Group(), {}, []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1), monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(distributed, "rendezvous", lambda *a, **k: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: begun.update(options, backend=backend))
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=group))
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)
    world = connect(torch.device("cuda"))
    assert begun["timeout"] == timedelta(hours=1) and begun["backend"] == f"cpu:gloo,cuda:{'nccl' if nccl else 'gloo'}"
    assert group.limits == ({"cuda": timedelta(minutes=10)} if nccl else {})
    assert at_exit == ([] if nccl else [world.close])
    distributed.limit_nccl(SimpleNamespace(_get_backend=lambda device: object()))      # a torch without this setting


@pytest.mark.parametrize("error", [None, ValueError("another of the 2 processes has ended")])
def test_after_an_error_train_does_not_close_the_group_because_nccl_would_wait_for_the_others(tmp_path, monkeypatch, capsys, error):
    def train_all(config, context):
        if error:
            raise error

    train, closed = load_script("train"), []
    monkeypatch.setattr(train, "connect", lambda device: World(0, 2)), monkeypatch.setattr(train, "train_all", train_all)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: closed.append(True))
    with nullcontext() if error is None else pytest.raises(ValueError, match="has ended"):
        train_here(train, [*SMALL, "--out", str(tmp_path / "run")], monkeypatch)
    assert closed == ([True] if error is None else [])


def test_others_that_cannot_be_reached_are_an_error_of_one_line(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda *a, **k: (_ for _ in ()).throw(dist.DistNetworkError("no\nroute")))
    with pytest.raises(ValueError, match="process 1 cannot reach the 1 others at 127.0.0.1:1: no$"):
        connect(torch.device("cpu"))


def test_weights_of_another_network_are_refused_before_any_is_loaded():
    net = nn.Linear(3, 2)
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match="bias"):
        load_whole(net, {"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"weight is a tensor of shape \[1, 3\] for one of \[2, 3\]"):
        load_whole(net, {"weight": torch.zeros(1, 3), "bias": torch.zeros(2)})
    assert all(torch.equal(own[name], tensor) for name, tensor in net.state_dict().items())
    load_whole(net, {"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert all(bool((p == 1).all()) for p in net.parameters())


def test_clipping_where_nothing_is_sharded_is_torch_s_own():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for n, p in enumerate(parameters[:2]):
        p.grad = torch.full((3,), 2.0 + n)
    copies = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for copy, p in zip(copies, parameters):
        copy.grad = p.grad.clone()
    assert clip(parameters, 1.5) == float(torch.nn.utils.clip_grad_norm_(copies, 1.5))
    assert all(torch.equal(copy.grad, p.grad) for copy, p in zip(copies, parameters))


def test_ordinary_tensors_are_copied_by_host_copy_unless_they_are_not_to_be_kept():
    tensor = torch.ones(3)
    assert checkpoint.host_copy({"a": tensor}, keep=False) == {}
    copy = checkpoint.host_copy({"a": tensor})["a"]
    tensor.zero_()
    assert copy.tolist() == [1, 1, 1]
