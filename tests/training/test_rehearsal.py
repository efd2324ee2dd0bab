"""One step of everything before pictures are encoded: what it decides, what it refuses, and that it changes nothing in the run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, SMALL, load_script, log_without_timing, script, thinned, train_here, weights

from tinyldm.config import change, make_config, parse
from tinyldm.device import check_kernels
from tinyldm.models.vae import AutoencoderKL
from tinyldm.objectives import denoising
from tinyldm.training import rehearsal, second_stage
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World
from tinyldm.training.learner import Learner

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WORDS = [*SMALL, "--batch-size", "8", "--stages", "16=0.5", "32=0.5", "--encode-batch-size", "3", "--vae-steps", "1", "--max-steps", "4",
         "--sample-steps", "1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of these words that compiles nothing and rehearses nothing."""
    folder = tmp_path_factory.mktemp("rehearsal") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_here(load_script("train"), ["--out", str(folder), *WORDS], patch)
    return folder


@pytest.fixture
def on_gpu(monkeypatch):
    """As if this were a GPU on which the run compiles; a compiled network is the network itself."""
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # nothing is compiled, and loading the compiler takes seconds
    monkeypatch.setattr(second_stage.torch, "compile", lambda net, **options: net)
    monkeypatch.setattr(rehearsal, "wants_compile", lambda config, device: config.run.compile is not False)


@pytest.fixture
def rehearse(undisturbed, on_gpu, tmp_path):
    """A function: rehearse with these settings."""
    (tmp_path / "vae").symlink_to(undisturbed / "vae")

    def rehearse(world=None, **settings):
        config = change(parse(["--out", str(tmp_path), *WORDS], "", {})[0], **settings)
        return rehearsal.rehearse(config, RunContext(tmp_path, CPU, world or World(), SimpleNamespace(received=0), None), None)
    return rehearse


def note(monkeypatch, owner, name, shape=lambda *arguments: arguments):
    """-> a list of what shape(*arguments) is in every call of owner.name."""
    real, seen = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *arguments, **options: (seen.append(shape(*arguments)), real(*arguments, **options))[1])
    return seen


def fail(monkeypatch, when, error):
    """Raise `error` in the loss of the micro-batches for which when(size, network) is true."""
    real = denoising.sample_losses

    def sample_losses(net, x0, *arguments, **options):
        if when(len(x0), net):
            raise error
        return real(net, x0, *arguments, **options)

    monkeypatch.setattr(denoising, "sample_losses", sample_losses)


def broken(net, **options):
    """torch.compile on a machine without a C++ compiler."""
    def forward(*inputs):
        raise RuntimeError("InvalidCxxCompiler: no compiler found\nand much more")
    return forward


# ---------------------------------------------------------------- what is tried


def test_every_phase_trains_micro_batches_of_its_size_updates_encodes_and_decodes(rehearse, monkeypatch):
    trained = note(monkeypatch, denoising, "sample_losses", lambda net, x0, *more: tuple(x0.shape))
    encoded = note(monkeypatch, AutoencoderKL, "encode", lambda vae, x: tuple(x.shape))
    decoded = note(monkeypatch, rehearsal, "decode", lambda vae, z: tuple(z.shape))
    updates = note(monkeypatch, Learner, "update", lambda learner, turn, norm, *more: norm)
    found = rehearse(grad_accum=2)
    assert trained == [(4, 8, 8, 8)] * 3 + [(1, 8, 16, 16)] * 3             # grad_accum is 2, and 8 for four times the pixels
    assert found.micro_batches == [2, 8] and found.config.run.compile is True
    assert encoded == [(3, 3, 16, 16), (3, 3, 32, 32)] and decoded == [(1, 8, 8, 8), (1, 8, 16, 16)]
    assert len(updates) == 4 and all(norm > 0 for norm in updates)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_takes_as_much_memory_as_a_later_step_of_the_run(rehearse, monkeypatch, accumulated):
    learners, found, real, begin = [], [], denoising.sample_losses, Learner.__init__

    def sample_losses(*arguments, **options):
        found.append((any(p.grad is not None for p in learners[0].parameters.values()), any(o.state for o in learners[0].all_optimizers)))
        return real(*arguments, **options)

    monkeypatch.setattr(denoising, "sample_losses", sample_losses)
    monkeypatch.setattr(Learner, "__init__", lambda learner, *arguments: (learners.append(learner), begin(learner, *arguments))[1])
    rehearse(grad_accum=accumulated, stages={})
    assert found == [(False, False), (False, True), (True, True)][:accumulated + 1]        # (gradients, the optimizer's state)


def test_latents_that_are_there_are_not_encoded_once_more(rehearse, monkeypatch):
    encoded = note(monkeypatch, AutoencoderKL, "encode")
    rehearse(cache=["here", "there"])
    assert not encoded


def test_on_a_cpu_nothing_is_tried_unless_compiling_was_asked_for(undisturbed, monkeypatch):
    built = note(monkeypatch, rehearsal, "try_phases")
    context = RunContext(undisturbed, CPU, World(), SimpleNamespace(received=0), None)
    config, counts = rehearsal.rehearse(make_config(), context, None)
    assert config.run.compile is False and counts == [] and not built


# ---------------------------------------------------------------- memory


def test_micro_batches_are_halved_until_they_fit_and_training_begins_with_that_number(rehearse, monkeypatch, capsys):
    fail(monkeypatch, lambda size, net: size > 3, torch.OutOfMemoryError("CUDA out of memory"))
    assert rehearse().micro_batches == [4, 4]                   # micro-batches of 8, 4, 2; at first one of 2 at the second size


@pytest.mark.parametrize("error", thinned(2, [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]))
def test_a_picture_that_does_not_fit_alone_is_refused(rehearse, monkeypatch, error):
    fail(monkeypatch, lambda size, net: True, error)
    with pytest.raises(ValueError, match="out of memory with a picture of 16 px alone"):
        rehearse()


@pytest.mark.slow
def test_the_run_begins_with_the_micro_batches_that_fit(undisturbed, on_gpu, tmp_path, monkeypatch):
    fail(monkeypatch, lambda size, net: size > 3 and torch.is_grad_enabled(), torch.OutOfMemoryError("CUDA out of memory"))
    trained = note(monkeypatch, denoising, "sample_losses", lambda net, x0, *more: (torch.is_grad_enabled(), len(x0)))
    train_here(load_script("train"), ["--out", str(tmp_path / "run"), *WORDS], monkeypatch)
    sizes = [size for gradients, size in trained if gradients]
    # 1: the check of the settings. Then two phases are tried, 3 micro-batches each; then 4 steps of 4.
    assert sizes == [1, 8, 4, *[2] * 2 * 3, *[2] * 4 * 4]
    assert not [row for row in log_without_timing(tmp_path / "run") if row.get("event") == "memory"]


# ---------------------------------------------------------------- the compiler


def test_where_the_compiler_fails_the_run_goes_on_without_it_and_says_why(rehearse, monkeypatch, capsys):
    monkeypatch.setattr(second_stage.torch, "compile", broken)
    config, counts = rehearse()
    assert config.run.compile is False and counts == [1, 4]
    assert capsys.readouterr().out == ("torch.compile fails on this machine (RuntimeError: InvalidCxxCompiler: no compiler found): the run "
                                       "goes on without it, more slowly\n")


def test_where_it_fails_although_it_was_asked_for_the_run_is_refused(rehearse, monkeypatch):
    monkeypatch.setattr(second_stage.torch, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile: .* \(RuntimeError: InvalidCxxCompiler: no compiler found\): leave the flag out"):
        rehearse(compile=True)


@pytest.mark.slow
def test_a_run_that_is_refused_has_encoded_nothing(undisturbed, on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(second_stage.torch, "compile", broken)
    with pytest.raises(ValueError, match="--compile: torch.compile fails"):
        train_here(load_script("train"), ["--out", str(tmp_path / "run"), *WORDS, "--compile"], monkeypatch)
    assert (tmp_path / "run" / "vae").exists() and not (tmp_path / "run" / "latents-16").exists()


def test_an_error_that_is_not_the_compiler_s_is_raised_as_it_is(rehearse, monkeypatch):
    fail(monkeypatch, lambda size, net: True, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rehearse()


def test_each_process_tries_alone_and_all_go_on_as_the_one_with_the_least_memory_and_the_worst_compiler(rehearse):
    """One that runs out of memory takes its step later than the others, who must not wait for it in the optimizer."""
    class Others(World):
        def all_reduce_max(self, *values):
            return [float(max(pair)) for pair in zip(values, (1, 4, 1), strict=True)]

        def wait(self, *tensors):
            raise AssertionError("the other process does not answer yet")

        sum = all_gather = broadcast_tensors = wait

    config, counts = rehearse(Others(0, 2))
    assert config.run.compile is False and counts == [4, 2]


def test_a_rehearsal_changes_nothing_in_the_run(undisturbed, on_gpu, tmp_path, monkeypatch):
    """Its random numbers, networks and gradients are its own."""
    updates = note(monkeypatch, Learner, "update")
    train_here(load_script("train"), ["--out", str(tmp_path / "run"), *WORDS], monkeypatch)
    assert len(updates) == 1 + 2 * 2 + 4
    one, two = (weights(folder / "checkpoints" / "step-000004") for folder in (undisturbed, tmp_path / "run"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert log_without_timing(undisturbed) == log_without_timing(tmp_path / "run")


@pytest.mark.slow
def test_without_a_c_compiler_a_run_that_was_told_to_compile_ends_before_anything_is_encoded(tmp_path, undisturbed):
    """With the real torch.compile."""
    env = ENVIRONMENT | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    words = ["--out", tmp_path / "run", *WORDS, "--vae-weights", undisturbed / "vae", "--compile"]
    done = script("train.py", *words, env=env)
    assert (undisturbed / "latents-16").exists()
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --compile: torch.compile fails on this machine")
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "latents-16").exists()


# ---------------------------------------------------------------- GPUs


@pytest.mark.parametrize("name, settings, compiled", [
    pytest.param("NVIDIA GeForce RTX 5090", dict(preset="5090_week", stages="256=1"), True, marks=pytest.mark.slow),
    pytest.param("NVIDIA H200", dict(preset="tiny"), False, marks=pytest.mark.slow),
    ("NVIDIA GeForce RTX 5090", dict(preset="5090_week", compile=False), False), ("NVIDIA H200", dict(preset="tiny", compile=True), True),
    ("NVIDIA GeForce RTX 5090", dict(preset="5090_week", fsdp=True), False)])
def test_whether_a_run_compiles_follows_from_its_hours_on_this_gpu(monkeypatch, name, settings, compiled):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config = parse([f"--{key}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{key}"
                    for key, value in settings.items()], "", {})[0]
    assert rehearsal.wants_compile(config, CUDA) is compiled
    assert rehearsal.wants_compile(change(config, compile=None), CPU) is False


def test_a_run_on_a_faster_gpu_takes_less_time_and_does_not_compile(monkeypatch):
    config = parse(["--preset", "tiny", "--max-steps", "6000000"], "", {})[0]
    found = []
    for name in ("NVIDIA GeForce RTX 5090", "NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found.append(rehearsal.wants_compile(config, CUDA))
    assert found == [True, False]


BUILT = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120".split()


@pytest.mark.parametrize("built, capability, runs", [
    (BUILT, (12, 0), True), (BUILT, (8, 9), True), (BUILT, (7, 0), False), (BUILT, (12, 1), True), (BUILT, (13, 0), True),
    ("sm_50 sm_80 sm_86 sm_90".split(), (12, 0), False), ("sm_50 sm_80 sm_86 sm_90".split(), (8, 9), True),
    ("sm_50 sm_80 sm_86 sm_90".split(), (8, 0), True), ("sm_86 sm_90a".split(), (8, 0), False), (["compute_90"], (8, 6), False), ([], (9, 0), True)])
def test_a_gpu_that_this_torch_has_no_kernels_for_is_refused(monkeypatch, built, capability, runs):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    if runs:
        assert check_kernels(CUDA) == CUDA
    else:
        with pytest.raises(ValueError, match=rf"no kernels for a GPU \(sm_{capability[0]}{capability[1]}\), only for {' '.join(built)}: install"):
            check_kernels(CUDA)
