"""How pictures are put into batches for the VAE: when memory runs out, with torch.compile, and while a GPU is busy."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preparing import CPU, VAE, Overflowing, contents, latent, make_vae, numbered, picture, run, settings, shard
from pretend_gpu import PretendGpu

from tinyldm.data import encoding, prepare
from tinyldm.data.encoding import BatchSize
from tinyldm.files import Claims

CUDNN = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")


@pytest.fixture
def limit(monkeypatch):
    """A function that sets how many pictures fit into memory at once -> the list of the sizes of all batches, fitting or not."""
    real, sizes = encoding.posterior, []

    def set_limit(fits: int, error=torch.OutOfMemoryError("CUDA out of memory"), when=lambda dtype: True) -> list[int]:
        def posterior(vae, images, device, dtype):
            sizes.append(len(images))
            if len(images) > fits and when(dtype):
                raise error
            return real(vae, images, device, dtype)

        monkeypatch.setattr(encoding, "posterior", posterior)
        sizes.clear()
        return sizes

    return set_limit


def two_shards(tmp_path) -> None:
    """Shards of 7 and 11 pictures, the second of two sizes once there are buckets."""
    shard(tmp_path / "s-0.tar", numbered(0, 7))
    shard(tmp_path / "s-1.tar", numbered(7, 6) | {f"{i:06d}": {"png": picture(i, (32, 16)), "txt": f"picture {i}".encode()}
                                                  for i in range(13, 18)})


def config_of(tmp_path, size: int, **changes):
    return settings(tmp_path, "s-*", encode_batch_size=size, resolution=16, buckets=3.0, network="dit", dit={"patch": 1}, **changes)


@pytest.mark.parametrize("size, fits, left, error", [
    (4, 3, 2, torch.OutOfMemoryError("CUDA out of memory")), (4, 1, 1, CUDNN), (5, 2, 2, MemoryError())])
def test_a_job_that_runs_out_of_memory_makes_the_cache_of_one_that_began_with_the_smaller_batches(tmp_path, limit, capsys, size, fits, left,
                                                                                                 error):
    two_shards(tmp_path)
    expected = run(config_of(tmp_path, left), tmp_path / "expected")
    assert len(expected.sizes) == 2
    sizes = limit(fits, error)
    cache = run(config_of(tmp_path, size), tmp_path / "cache")
    assert contents(tmp_path / "cache" / "shards") == contents(tmp_path / "expected" / "shards")
    assert sorted(cache.captions(i)[0][1] for i in range(len(cache))) == sorted(f"picture {i}" for i in range(18))
    assert max(sizes[size.bit_length():]) <= left                               # the smaller size is kept for the other shard
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(said) == sum(n > fits for n in sizes) and f"16x16 pixels: encoding goes on with {left} at once" in said[-1]
    assert cache.settings == expected.settings | {"data": cache.settings["data"]}


def test_a_restarted_job_begins_with_the_batches_that_fitted_and_ends_with_the_same_bytes(tmp_path, limit, capsys):
    two_shards(tmp_path)
    limit(2)
    run(config_of(tmp_path, 8), tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill():
        if next(tmp_path.glob("cache/shards/[!.]*/shard.json"), None):
            raise Killed

    with pytest.raises(Killed):
        prepare.prepare(config_of(tmp_path, 8), tmp_path / "cache", VAE, CPU, check=kill)
    sizes = limit(2)
    capsys.readouterr()
    run(config_of(tmp_path, 8), tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole") and max(sizes) == 2
    assert "encoding 2 pictures at once, not 8" in capsys.readouterr().out
    assert (tmp_path / "cache" / "encode_batch_size").read_text() == "2\n"


def test_a_rebuilt_cache_is_tried_with_whole_batches_again(tmp_path, limit):
    two_shards(tmp_path)
    limit(2)
    run(config_of(tmp_path, 4), tmp_path / "cache")
    sizes = limit(4)
    run(config_of(tmp_path, 4, flip=True), tmp_path / "cache", rebuild=True)
    assert max(sizes) == 4 and not (tmp_path / "cache" / "encode_batch_size").exists()


def test_memory_that_runs_out_in_the_middle_of_a_shard_loses_and_doubles_no_picture(tmp_path, monkeypatch):
    two_shards(tmp_path)
    plain, real, calls = run(config_of(tmp_path, 4), tmp_path / "plain"), encoding.posterior, []

    def posterior(vae, images, *more):
        calls.append(len(images))
        if len(calls) > 1 and len(images) > 2:                                  # another program takes the memory
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(vae, images, *more)

    monkeypatch.setattr(encoding, "posterior", posterior)
    cache = run(config_of(tmp_path, 4), tmp_path / "cache")
    assert [n for n in calls if n > 2] == [4, 3] and len(cache) == 18
    assert [cache.captions(i) for i in range(18)] == [plain.captions(i) for i in range(18)]
    for i in range(18):
        assert np.allclose(cache.latents([i]).astype(float), plain.latents([i]).astype(float), atol=2e-3)


def test_where_a_single_picture_does_not_fit_the_error_says_what_to_do_and_finished_shards_stay(tmp_path, limit, encoded):
    two_shards(tmp_path)
    run(settings(tmp_path, "s-0.tar", resolution=16), tmp_path / "cache")
    limit(0)
    encoded.clear()
    with pytest.raises(ValueError, match="out of memory while a single picture of 16x16 pixels is encoded: use fewer pixels"):
        prepare.prepare(settings(tmp_path, "s-*", resolution=16), tmp_path / "cache", VAE, CPU)
    assert encoded == ["s-1.tar"] and len([*tmp_path.glob("cache/shards/*")]) == 1 and not (tmp_path / "cache" / "index.json").exists()


def test_an_error_that_has_other_causes_does_not_make_batches_smaller(tmp_path, limit):
    two_shards(tmp_path)
    sizes = limit(0, RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"))
    with pytest.raises(RuntimeError, match="INTERNAL_ERROR"):
        prepare.prepare(config_of(tmp_path, 4), tmp_path / "cache", VAE, CPU)
    assert sizes == [4] and not (tmp_path / "cache" / "encode_batch_size").exists()


def test_latents_that_are_encoded_again_in_float32_may_need_smaller_batches(tmp_path, limit):
    shard(tmp_path / "s.tar", numbered(0, 8))
    in_bf16 = Overflowing(lambda pixels: torch.full((len(pixels),), torch.is_autocast_enabled("cpu")))
    sizes = limit(1, when=lambda dtype: dtype == "fp32")
    cache = run(settings(tmp_path, "s.tar", dtype="bf16"), tmp_path / "cache", in_bf16)
    assert sizes == [4, 4, 4, 2, 1, 1, 1, 1, 4, 2, 1, 1, 1, 1]
    assert all(torch.allclose(torch.from_numpy(cache.latents([i]))[0, 0].float(), latent(i), atol=2e-3) for i in range(8))


def test_of_several_processes_that_run_out_of_memory_the_smallest_size_is_noted(tmp_path):
    claims, item = Claims(tmp_path / "claims"), encoding.Item("a", np.zeros((16, 16, 3), np.uint8))
    one, two, third = (BatchSize(tmp_path, 32, claims) for _ in range(3))
    one.halve([item] * 32), one.halve([item] * 16)
    assert (one.count, two.count) == (8, 32)
    two.halve([item] * 32)
    assert two.count == BatchSize(tmp_path, 32, claims).count == 8 and BatchSize(tmp_path, 4, claims).count == 4
    (tmp_path / "encode_batch_size").write_text("much")                         # damaged: as if it were not there
    third.halve([item] * 20)
    assert third.count == BatchSize(tmp_path, 32, claims).count == 16


def test_a_batch_is_written_while_the_next_one_is_encoded(tmp_path, monkeypatch):
    """On a GPU, which computes one batch while the host fetches, checks and writes the one before."""
    shard(tmp_path / "s.tar", numbered(0, 10))
    events, encode, begin_copy = [], encoding.encode, encoding.begin_copy_to_host
    monkeypatch.setattr(encoding, "encode", lambda *arguments: (events.append("encode"), encode(*arguments))[1])

    def later(z):
        latents = begin_copy(z)
        return lambda: (events.append("fetch"), latents())[1]

    monkeypatch.setattr(encoding, "begin_copy_to_host", later)
    cache = run(settings(tmp_path, "s.tar"), tmp_path / "cache")
    assert events == ["encode", "encode", "fetch", "encode", "fetch", "fetch"]
    assert all(torch.allclose(torch.from_numpy(cache.latents([i]))[0, 0].float(), latent(i), atol=2e-3) for i in range(10))


def test_on_a_gpu_the_host_waits_once_per_batch_and_after_the_next_one_was_begun(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 10))
    run(settings(tmp_path, "s.tar"), tmp_path / "plain")
    with PretendGpu() as gpu:
        vae = make_vae().to("cuda")
        begun = len(gpu.events)
        assert prepare.prepare(settings(tmp_path, "s.tar"), tmp_path / "cache", vae, torch.device("cuda", 0)).kept == 10
    steps = [(event.kind, event.place.split()[-1]) for event in gpu.events[begun:] if "fingerprint" not in event.place]
    begin, fetch = [("pin", "pin"), ("upload", "upload"), ("download", "begin_copy_to_host")], ("wait", "fetch")
    assert steps == [*begin, *begin, fetch, *begin, fetch, fetch] and not gpu.mixed
    assert contents(tmp_path / "cache" / "shards") == contents(tmp_path / "plain" / "shards")


def test_latents_on_another_gpu_than_the_current_one_are_waited_for_on_that_gpu(monkeypatch):
    recorded = []
    with PretendGpu():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device or 'the current GPU'}")
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: SimpleNamespace(
            record=lambda stream=None: recorded.append(stream), synchronize=lambda: recorded.append("waited")))
        latents = encoding.begin_copy_to_host(torch.arange(3.0).to("cuda"))
        assert recorded == ["the stream of cuda:0"] and latents().tolist() == [0, 1, 2]
    assert recorded[1:] == ["waited"]


# ---------------------------------------------------------------- compiled


def test_whole_batches_are_encoded_by_one_static_graph_for_inference_and_the_rest_without_it(tmp_path, monkeypatch):
    two_shards(tmp_path)                                # square pictures: 4 + 3, and 4 + 4 + 3
    plain, graphs, batches = run(settings(tmp_path, "s-*"), tmp_path / "plain"), [], []

    def backend(graph, inputs):
        graphs.append((torch.is_grad_enabled(), [tensor.shape for tensor in inputs if tensor.shape[1:] == (3, 8, 8)]))
        return lambda *tensors: (batches.append(1), graph.forward(*tensors))[1]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    cache = run(settings(tmp_path, "s-*"), tmp_path / "cache", compile=True)
    assert graphs == [(False, [(4, 3, 8, 8)])] and len(batches) == 3
    for i in range(18):
        assert np.allclose(cache.latents([i]).astype(float), plain.latents([i]).astype(float), atol=2e-3)
        assert cache.captions(i) == plain.captions(i)
    assert cache.settings == plain.settings


@pytest.mark.slow
def test_inductors_latents_are_those_of_the_plain_autoencoder_up_to_rounding(tmp_path):
    two_shards(tmp_path)
    caches = [run(settings(tmp_path, "s-*"), tmp_path / str(compiled), compile=compiled) for compiled in (False, True)]
    one, two = (np.concatenate([cache.latents([i]) for i in range(18)]).astype(float) for cache in caches)
    assert 0.1 < one.std() and abs(one - two).max() < 2e-3


@pytest.mark.parametrize("at_once", [True, False])      # at the call of torch.compile, or at the first call of what it returns
def test_where_compiling_fails_pictures_are_encoded_without_it_and_the_reason_is_said_once(tmp_path, monkeypatch, capsys, at_once):
    two_shards(tmp_path)
    run(settings(tmp_path, "s-*"), tmp_path / "plain")

    def fail(*arguments, **options):
        raise RuntimeError("Cannot find a working triton installation\nmore lines")

    monkeypatch.setattr(torch, "compile", fail if at_once else lambda function, **options: fail)
    run(settings(tmp_path, "s-*"), tmp_path / "cache", compile=True)
    said = "torch.compile failed, pictures are encoded without it: RuntimeError: Cannot find a working triton installation\n"
    assert capsys.readouterr().out.count(said) == 1
    assert contents(tmp_path / "cache" / "shards") == contents(tmp_path / "plain" / "shards")


def test_a_compiled_autoencoder_that_runs_out_of_memory_stays_compiled_for_smaller_batches(tmp_path, monkeypatch, capsys):
    two_shards(tmp_path)
    expected, calls = run(settings(tmp_path, "s-*", encode_batch_size=2), tmp_path / "expected"), []

    def compile(function, **options):
        assert options == {"dynamic": False}

        def compiled(pixels):
            calls.append(len(pixels))
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(pixels)
        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    run(settings(tmp_path, "s-*"), tmp_path / "cache", compile=True)
    assert calls == [4] + [2] * (3 + 5) and "failed" not in capsys.readouterr().out
    assert contents(tmp_path / "cache" / "shards") == contents(tmp_path / "expected" / "shards") and len(expected) == 18
