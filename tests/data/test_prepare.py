"""The job that encodes a data set: right pairs, honest counts, caches that are whole, fitting or refused."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ENVIRONMENT, ROOT, randomise
from tinyldm.config import Config
from tinyldm.data import prepare
from tinyldm.data.cache import Cache
from tinyldm.data.encoding import Encoder, fingerprint
from tinyldm.models.vae import AutoencoderKL, Posterior, VAEConfig
from tinyldm.pipeline import to_pixels

CPU = torch.device("cpu")


def make_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return randomise(AutoencoderKL(VAEConfig(latent_channels=4, widths=(8, 8), depth=1, groups=4, middle_attention=False, **changes)))


VAE = make_vae()


def colour(i: int) -> tuple[int, int, int]:
    return (i * 37 % 256, i * 91 % 256, i * 151 % 256)


def picture(i: int, size=(12, 12), kind="PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour(i)).save(data, kind)
    return data.getvalue()


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, files in samples.items():
            for end, data in files.items():
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def numbered(start: int, count: int, **more) -> dict[str, dict[str, bytes]]:
    return {f"{i:06d}": {"png": picture(i), "txt": f"picture {i}".encode()} for i in range(start, start + count)}


def settings(tmp_path, *data, **changes) -> Config:
    words = [str(tmp_path / name) for name in data]
    return Config(**dict(data=words, resolution=8, vae_weights="the VAE", encode_batch_size=4, dtype="fp32") | changes)


def run(config: Config, folder: Path, vae=VAE, **options) -> Cache:
    assert prepare.prepare(config, folder, vae, CPU, **options)
    return Cache(folder)


def latent(i: int, vae=VAE, size=8) -> torch.Tensor:
    return vae.to_latents(vae.encode(to_pixels(np.full((1, size, size, 3), colour(i), np.uint8))).mean)[0].detach()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Names of the shards that are encoded."""
    names, real = [], prepare.encode_shard

    def noted(shard, *rest):
        names.append(Path(shard.url).name)
        return real(shard, *rest)

    monkeypatch.setattr(prepare, "encode_shard", noted)
    return names


def test_every_picture_lies_in_the_cache_beside_its_own_caption(tmp_path):
    shard(tmp_path / "s-0.tar", numbered(0, 7))
    shard(tmp_path / "s-1.tar.gz", numbered(7, 6))
    cache = run(settings(tmp_path, "s-*"), tmp_path / "cache")
    assert len(cache) == 13 and cache.shape == (1, 1, 4)
    for i in range(13):
        assert cache.captions(i) == [(0, f"picture {i}")]
        assert torch.allclose(torch.from_numpy(cache.latents(np.array([i])))[0, 0].float(), latent(i), atol=2e-3)


def test_mirrored_views_and_the_posteriors_std_are_kept_where_asked_for(tmp_path):
    half = Image.new("RGB", (8, 8), "black")
    half.paste("white", (0, 0, 4, 8))
    (tmp_path / "d").mkdir()
    half.save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "a.txt").write_text("half")
    cache = run(settings(tmp_path, "d", flip=True, moments=True), tmp_path / "cache")
    assert cache.shape == (2, 2, 4)
    for view, image in enumerate((half, half.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        posterior = VAE.encode(to_pixels(np.asarray(image)[None].copy()))
        mean, std = torch.from_numpy(cache.latents(np.array([0]), np.array([view])))[0].float()
        assert torch.allclose(mean, VAE.to_latents(posterior.mean)[0], atol=2e-3)
        assert torch.allclose(std, (0.5 * posterior.logvar[0]).exp() * VAE.config.scaling_factor, rtol=2e-3, atol=1e-6)


def test_aspect_buckets_keep_what_a_square_would_cut_off(tmp_path):
    (tmp_path / "d").mkdir()
    for i, size in enumerate([(32, 8), (8, 32), (16, 16)]):
        (tmp_path / "d" / f"{i}.png").write_bytes(picture(i, size))
        (tmp_path / "d" / f"{i}.txt").write_text(f"picture {i}")
    cache = run(settings(tmp_path, "d", resolution=16, buckets=4.0, network="dit", dit={"patch": 2}), tmp_path / "cache")
    assert {cache.captions(i)[0][1]: cache.latents(np.array([i])).shape[-2:] for i in range(3)} == {
        "picture 0": (4, 16), "picture 1": (16, 4), "picture 2": (8, 8)}
    assert cache.settings["unit"] == 4


def test_a_finished_cache_is_left_alone(tmp_path, encoded):
    shard(tmp_path / "s.tar", numbered(0, 3))
    run(settings(tmp_path, "s.tar"), tmp_path / "cache")
    before = contents(tmp_path / "cache")
    run(settings(tmp_path, "s.tar"), tmp_path / "cache")
    assert contents(tmp_path / "cache") == before and encoded == ["s.tar"]


def test_only_shards_that_are_new_or_changed_are_encoded(tmp_path, encoded):
    for i in range(3):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    run(settings(tmp_path, "s-*"), tmp_path / "cache")
    shard(tmp_path / "s-1.tar", numbered(50, 4))
    shard(tmp_path / "s-3.tar", numbered(9, 2))
    (tmp_path / "s-0.tar").unlink()
    encoded.clear()
    cache = run(settings(tmp_path, "s-*"), tmp_path / "cache")
    assert encoded == ["s-1.tar", "s-3.tar"]
    assert list(cache.all_captions()) == [f"picture {i}" for i in [50, 51, 52, 53, 6, 7, 8, 9, 10]]


def test_a_changed_caption_beside_a_picture_is_noticed(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(picture(1))
    (tmp_path / "d" / "a.txt").write_text("before")
    run(settings(tmp_path, "d"), tmp_path / "cache")
    (tmp_path / "d" / "a.txt").write_text("afterwards")
    assert run(settings(tmp_path, "d"), tmp_path / "cache").captions(0) == [(0, "afterwards")]


@pytest.mark.parametrize("changes, words", [
    ({"resolution": 16}, "resolution 8 there, 16 here"), ({"flip": True}, "flip false there, true here"),
    ({"moments": True}, "moments"), ({"min_side": 4}, "min_side"), ({"caption_key": ["prompt"]}, "caption_key"),
])
def test_a_cache_of_other_settings_is_refused_and_rebuilt_when_asked(tmp_path, encoded, changes, words):
    shard(tmp_path / "s.tar", {key: files | {"json": b'{"prompt": "p"}'} for key, files in numbered(0, 3).items()})
    run(settings(tmp_path, "s.tar"), tmp_path / "cache")
    before = contents(tmp_path / "cache")
    with pytest.raises(ValueError, match=words):
        run(settings(tmp_path, "s.tar", **changes), tmp_path / "cache")
    assert contents(tmp_path / "cache") == before
    cache = run(settings(tmp_path, "s.tar", **changes), tmp_path / "cache", rebuild=True)
    assert all(cache.settings[name] == value for name, value in changes.items()) and encoded == ["s.tar", "s.tar"]


def test_a_cache_of_another_vae_is_refused(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 3))
    run(settings(tmp_path, "s.tar"), tmp_path / "cache")
    other = make_vae()
    with torch.no_grad():
        other.quant_conv.bias[0] += 1e-4
    for vae in (other, make_vae(scaling_factor=0.5)):
        with pytest.raises(ValueError, match="vae .* there, .* here"):
            run(settings(tmp_path, "s.tar"), tmp_path / "cache", vae)
    assert fingerprint(make_vae(sample_size=99)) == fingerprint(VAE)                # a size to draw at, not of the weights


def test_a_folder_of_other_things_is_not_written_into(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 3))
    with pytest.raises(ValueError, match="s.tar.*name another folder"):
        run(settings(tmp_path, "s.tar"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_a_run_on_a_cache_takes_from_it_what_it_decides(tmp_path):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", {str(k): {"png": picture(k), "json": b'{"a": "x", "b": "y"}'} for k in range(3)})
    made = settings(tmp_path, "s-0.tar:0.25", "s-1.tar:0.75", caption_key=["a:0.9", "b:0.1"], flip=True, min_side=3)
    cache = run(made, tmp_path / "cache")
    plain = Config(resolution=8, vae_weights="the VAE")
    config = prepare.adopt(plain, cache, VAE)
    assert (config.data, config.caption_key, config.flip, config.min_side) == (made.data, made.caption_key, True, 3)
    other = prepare.adopt(settings(tmp_path, "s-0.tar:0.5", "s-1.tar:0.5", caption_key=["a:0.2", "b:0.8"]), cache, VAE)
    assert other.caption_key == ["a:0.2", "b:0.8"] and other.data[0].endswith("s-0.tar:0.5")
    with pytest.raises(ValueError, match="has a b"):
        prepare.adopt(settings(tmp_path, "s-0.tar", caption_key=["b"]), cache, VAE)
    with pytest.raises(ValueError, match="resolution 8 there, 16 here"):
        prepare.adopt(Config(resolution=16, vae_weights="the VAE"), cache, VAE)
    other = make_vae(scaling_factor=0.5)
    with pytest.raises(ValueError, match="vae .* there"):
        prepare.adopt(plain, cache, other)


def test_pictures_in_buckets_fit_the_network_they_are_for(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 3))
    cache = run(settings(tmp_path, "s.tar", buckets=2.0, network="dit", dit={"patch": 1}), tmp_path / "cache")
    assert prepare.adopt(Config(resolution=8, vae_weights="v", network="dit", dit={"patch": 1}), cache, VAE).buckets == 2.0
    with pytest.raises(ValueError, match="multiples of 2 pixels, this network takes multiples of 4"):
        prepare.adopt(Config(resolution=8, vae_weights="v", network="dit", dit={"patch": 2}), cache, VAE)


def spoilt(tmp_path) -> Config:
    """A shard of 40 with two that cannot be used and three that the filters drop."""
    samples = numbered(0, 40)
    samples["000003"]["png"] = b"no picture"
    samples["000007"] = {"png": picture(7), "txt": b"   "}
    samples["000009"]["txt"] = b"x" * 50
    samples["000010"]["txt"] = b"x"
    samples["000011"]["png"] = picture(11, (9, 30))
    shard(tmp_path / "s.tar", samples)
    return settings(tmp_path, "s.tar", min_caption=2, max_caption=20, min_side=10)


def test_what_is_left_out_is_counted_and_named_with_its_reason(tmp_path):
    report = prepare.prepare(spoilt(tmp_path), tmp_path / "cache", VAE, CPU)
    assert (report.read, report.kept) == (40, 35)
    assert report.skipped == Counter({"unreadable": 1, "no caption": 1})
    assert report.filtered == Counter({"caption too short or too long": 2, "too small": 1})
    rows = [json.loads(line) for line in (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("000003", "unreadable"), ("000007", "no caption"), ("000009", "caption too short or too long"),
        ("000010", "caption too short or too long"), ("000011", "too small")]
    assert all(row["shard"].startswith("s-") for row in rows)
    assert "2 (5.00%)" in str(report) and "35 kept" in str(report)
    assert not any(f"picture {i}" in list(Cache(tmp_path / "cache").all_captions()) for i in (3, 7, 9, 10, 11))


def test_too_many_unusable_samples_stop_the_job_and_leave_no_cache_that_looks_whole(tmp_path, encoded):
    config = spoilt(tmp_path)
    config.max_skip = 0.04
    with pytest.raises(ValueError, match="2 of 40 samples .* --max-skip 0.04 .*1 unreadable"):
        prepare.prepare(config, tmp_path / "cache", VAE, CPU)
    assert not (tmp_path / "cache" / "index.json").exists()
    config.max_skip = 0.05
    assert prepare.prepare(config, tmp_path / "cache", VAE, CPU) and encoded == ["s.tar"]    # what was encoded stayed


def test_the_first_thousand_samples_are_enough_to_stop(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(prepare, "FEW", 4)
    for i in range(3):
        shard(tmp_path / f"s-{i}.tar", {str(k): {"png": b"junk", "txt": b"x"} for k in range(4)} if i == 0 else numbered(i, 40))
    with pytest.raises(ValueError, match="4 of 4 samples"):
        prepare.prepare(settings(tmp_path, "s-*"), tmp_path / "cache", VAE, CPU)
    assert encoded == ["s-0.tar"]


def test_a_source_without_one_usable_picture_says_what_is_wrong(tmp_path):
    shard(tmp_path / "s.tar", {"a": {"png": picture(1)}, "b": {"png": b"junk", "txt": b"words"}})
    with pytest.raises(ValueError, match="not one usable picture.*no caption.*unreadable|not one usable picture.*unreadable.*no caption"):
        prepare.prepare(settings(tmp_path, "s.tar", max_skip=1.0), tmp_path / "cache", VAE, CPU)
    with pytest.raises(ValueError, match="not one usable picture"):
        prepare.some_pictures(settings(tmp_path, "s.tar"), 4)


def test_a_gzipped_shard_with_a_wrong_checksum_is_dropped_whole(tmp_path):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar.gz", numbered(120 * i, 120))
    data = bytearray((tmp_path / "s-0.tar.gz").read_bytes())
    data[-6] ^= 1                                                       # in the CRC: every byte of the samples is right
    (tmp_path / "s-0.tar.gz").write_bytes(data)
    report = prepare.prepare(settings(tmp_path, "s-*", max_skip=0.5), tmp_path / "cache", VAE, CPU)
    assert report.kept == 120 and report.skipped == Counter({"archive damaged": 119})   # the last was still being read
    assert list(Cache(tmp_path / "cache").all_captions()) == [f"picture {i}" for i in range(120, 240)]
    damaged, = tmp_path.glob("cache/shards/s-0*")
    assert {file.name for file in damaged.iterdir()} == {"shard.json", "skipped.jsonl"}


def test_what_is_no_archive_costs_its_own_shard_only(tmp_path, capsys):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(10 * i, 10))
    (tmp_path / "s-0.tar").write_bytes(b"junk" * 500)
    config = settings(tmp_path, "s-*", max_skip=0.5)
    report = prepare.prepare(config, tmp_path / "cache", VAE, CPU)
    assert report.kept == 10 and report.skipped == Counter({"archive damaged": 1})
    assert "s-0.tar is not a tar archive" in capsys.readouterr().out
    assert len(prepare.some_pictures(config, 4)[0]) == 4
    with pytest.raises(ValueError, match="not one usable picture.*s-0.tar is not a tar archive"):
        prepare.some_pictures(settings(tmp_path, "s-0.tar"), 4)


class Overflowing(AutoencoderKL):
    """A VAE that answers with infinity for bright pictures in batches of its liking."""

    def __init__(self, fails):
        super().__init__(VAE.config)
        self.load_state_dict(VAE.state_dict())
        self.fails = fails

    def encode(self, pixels):
        mean, logvar = super().encode(pixels)
        return Posterior(torch.where(self.fails(pixels)[:, None, None, None], float("inf"), mean), logvar)


def test_latents_that_are_not_finite_are_encoded_again_in_float32_or_dropped(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 10))
    in_bf16 = Overflowing(lambda pixels: torch.full((len(pixels),), torch.is_autocast_enabled("cpu")))
    cache = run(settings(tmp_path, "s.tar", dtype="bf16"), tmp_path / "one", in_bf16)
    assert len(cache) == 10
    assert all(torch.allclose(torch.from_numpy(cache.latents(np.array([i])))[0, 0].float(), latent(i), atol=2e-3) for i in range(10))
    bad = [3, 4]
    always = Overflowing(lambda pixels: torch.stack([(pixels[:, :, 0, 0] - to_pixels(np.full((1, 1, 1, 3), colour(i), np.uint8))
                                                      [:, :, 0, 0]).abs().amax(1) < 1e-3 for i in bad]).any(0))
    report = prepare.prepare(settings(tmp_path, "s.tar", max_skip=0.2), tmp_path / "two", always, CPU)
    assert report.skipped == Counter({"latents not finite": 2})
    assert list(Cache(tmp_path / "two").all_captions()) == [f"picture {i}" for i in range(10) if i not in bad]


def test_several_captions_of_a_picture_are_all_kept_with_their_kinds(tmp_path):
    samples = {"0": {"png": picture(0), "json": b'{"dense": "a long caption", "short": ["one", "two"]}'},
               "1": {"png": picture(1), "json": b'{"short": "only short"}'}}
    shard(tmp_path / "s.tar", samples)
    cache = run(settings(tmp_path, "s.tar", caption_key=["dense:0.7", "short:0.3"]), tmp_path / "cache")
    assert [cache.captions(i) for i in range(2)] == [[(0, "a long caption"), (1, "one"), (1, "two")], [(1, "only short")]]


def test_the_batch_that_encodes_never_reaches_beyond_a_shard(tmp_path):
    """So that a shard's bytes do not depend on its neighbours."""
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(5 * i, 5))
    run(settings(tmp_path, "s-*"), tmp_path / "both")
    run(settings(tmp_path, "s-1.tar"), tmp_path / "one")
    both, one = ({name: data for name, data in contents(tmp_path / folder / "shards").items() if name.startswith("s-1")}
                 for folder in ("both", "one"))
    assert both == one and len(one) >= 5


def test_processes_at_the_same_time_share_the_shards(tmp_path, encoded, monkeypatch):
    for i in range(4):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    config, folder = settings(tmp_path, "s-*"), tmp_path / "cache"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(prepare.Claims, "take", lambda self, name: name[2] in "02")       # the other has the odd ones
    assert prepare.prepare(config, folder, VAE, CPU) is None and not (folder / "index.json").exists()
    assert encoded == ["s-0.tar", "s-2.tar"]
    monkeypatch.setattr(prepare.Claims, "take", lambda self, name: True)
    monkeypatch.setenv("RANK", "1")
    (folder / "shards").rename(tmp_path / "aside")
    (folder / "shards").mkdir()
    encoded.clear()
    assert prepare.prepare(config, folder, VAE, CPU)
    assert encoded == ["s-1.tar", "s-3.tar", "s-0.tar", "s-2.tar"]                          # one's own first, then the rest


def test_a_source_that_is_lost_half_way_costs_its_own_shard_only(tmp_path, monkeypatch):
    for i in range(3):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    real, broken = prepare.encode_shard, [True]

    def flaky(it, *rest):
        if "s-1" in it.url and broken:
            raise prepare.SourceLost(f"{it.url}: stopped at byte 10")
        return real(it, *rest)

    monkeypatch.setattr(prepare, "encode_shard", flaky)
    with pytest.raises(ValueError, match="1 of 3 shards could not be read.*s-1.tar: stopped at byte 10"):
        prepare.prepare(settings(tmp_path, "s-*"), tmp_path / "cache", VAE, CPU)
    broken.clear()
    assert len(run(settings(tmp_path, "s-*"), tmp_path / "cache")) == 9


def test_a_full_disk_leaves_finished_shards_and_nothing_half_written(tmp_path, monkeypatch):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    real = Encoder.flush

    def full(self, batch):
        if "picture 3" in batch[0].captions[0][1]:
            raise OSError(28, "No space left on device")
        real(self, batch)

    monkeypatch.setattr(Encoder, "flush", full)
    with pytest.raises(OSError, match="no room left for .*run the same command again"):
        prepare.prepare(settings(tmp_path, "s-*"), tmp_path / "cache", VAE, CPU)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1 and not (tmp_path / "cache" / "index.json").exists()
    monkeypatch.setattr(Encoder, "flush", real)
    assert len(run(settings(tmp_path, "s-*"), tmp_path / "cache")) == 6


def test_a_finished_cache_serves_while_its_remote_source_is_away(tmp_path, monkeypatch, capsys):
    import fsspec
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/s.tar", shard(tmp_path / "s.tar", numbered(0, 3)).read_bytes())
    config = Config(data=["memory://bucket/s.tar"], resolution=8, dtype="fp32")
    run(config, tmp_path / "cache")

    def away(*words, **options):
        raise ValueError("no network")

    monkeypatch.setattr(prepare, "list_shards", away)
    assert len(run(config, tmp_path / "cache")) == 3 and "no network" in capsys.readouterr().out
    with pytest.raises(ValueError, match="flip false there, true here"):
        run(replace(config, flip=True), tmp_path / "cache")
    with pytest.raises(ValueError, match="no network"):
        prepare.prepare(config, tmp_path / "other", VAE, CPU)


def test_the_posteriors_width_is_measured_and_judged(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 12))
    wide = make_vae()
    with torch.no_grad():
        wide.quant_conv.weight[4:], wide.quant_conv.bias[4:] = 0, 0.0                       # logvar 0: a std of 1
    report = prepare.prepare(settings(tmp_path, "s.tar"), tmp_path / "cache", wide, CPU)
    z = torch.stack([latent(i, wide).half().float() for i in range(12)])
    assert report.width == pytest.approx(wide.config.scaling_factor / float(z.std(correction=0)), rel=1e-3)
    assert "worth its space" in str(report)
    assert "the mean is enough" in str(report._replace(stats=Counter({**report.stats, "variance": 1e-4})))


def test_some_pictures_come_from_all_shards_alike(tmp_path):
    for i in range(4):
        shard(tmp_path / f"s-{i}.tar", numbered(100 * i, 10 if i else 1))
    items, faults = prepare.some_pictures(settings(tmp_path, "s-*"), 13)
    assert [int(item.captions[0][1].split()[1]) // 100 for item in items] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3] and not faults
    items, _ = prepare.some_pictures(settings(tmp_path, "s-*"), 1000)
    assert len(items) == 31


# ---------------------------------------------------------------- killed

DRIVER = """
import importlib.util, os, random, sys
spec = importlib.util.spec_from_file_location("support", sys.argv[1])
support = importlib.util.module_from_spec(spec)
spec.loader.exec_module(support)
support.torch.set_num_threads(1)
source, folder, kills = support.Path(sys.argv[2]), support.Path(sys.argv[3]), int(sys.argv[4])

def go():
    support.prepare.prepare(support.settings(source, "s-*", max_skip=0.5), folder, support.VAE, support.CPU)

def die_at(count):
    left = [count]
    def hook(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(args[0]):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
    sys.addaudithook(hook)

died = 0
for kill in range(kills):
    if not (child := os.fork()):
        die_at(random.Random(kill).randrange(40))
        go()
        os._exit(0)
    died += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if (folder / "index.json").exists():
        support.Cache(folder)                            # looks whole: then it is
        break
go()
print(died)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed often")
@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_job_killed_at_any_file_operation_ends_with_the_same_bytes(tmp_path, kills):
    for i in range(6):
        shard(tmp_path / f"s-{i}.tar", numbered(7 * i, 7) | {"x": {"png": b"junk", "txt": b"x"}})
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for name, times in (("whole", 0), ("killed", kills)):
        words = [sys.executable, "-c", DRIVER, __file__, str(tmp_path), str(tmp_path / name), str(times)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= min(times, 5)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
