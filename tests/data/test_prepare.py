"""The job that encodes a data set: correct pairs, complete caches, and caches used only with matching settings."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from preparing import CPU, VAE, contents, latent, make_vae, numbered, picture, run, settings, shard

from tinyldm.config import make_config
from tinyldm.data import encoding, prepare
from tinyldm.data.cache import Cache
from tinyldm.data.encoding import fingerprint
from tinyldm.pictures.pixels import to_pixels


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


@pytest.mark.parametrize("pixels", [1, 2])
def test_pictures_lie_beside_their_latents_where_asked_for_as_they_are_or_smaller(tmp_path, pixels):
    """A run on the cache takes them over, and the job refuses a folder in which pictures are kept otherwise."""
    (tmp_path / "d").mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    image.save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "a.txt").write_text("noise")
    cache = run(settings(tmp_path, "d", flip=True, keep_pictures=pixels), tmp_path / "cache")
    side = 8 * pixels // VAE.config.downscale
    wanted = np.asarray(image if side == 8 else image.resize((side, side), Image.Resampling.BICUBIC))
    found = cache.read_pictures(np.array([0, 0]), np.array([0, 1]))
    assert np.array_equal(found, np.stack([wanted, wanted[:, ::-1]]))
    assert prepare.adopt(make_config(resolution=8, vae_weights="the VAE"), cache, VAE).data.keep_pictures == pixels
    run(settings(tmp_path, "d", flip=True), tmp_path / "other")
    assert prepare.adopt(make_config(resolution=8, vae_weights="the VAE"), Cache(tmp_path / "other"), VAE).data.keep_pictures == 0
    with pytest.raises(ValueError, match=f"keep_pictures null in the cache, {pixels} in this run"):
        run(settings(tmp_path, "d", flip=True, keep_pictures=pixels), tmp_path / "other")
    with pytest.raises(ValueError, match=f"keep_pictures {pixels} in the cache, null in this run"):
        run(settings(tmp_path, "d", flip=True), tmp_path / "cache")


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
    ({"resolution": 16}, "resolution 8 in the cache, 16 in this run"), ({"flip": True}, "flip false in the cache, true in this run"),
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
        with pytest.raises(ValueError, match="vae .* in the cache, .* in this run"):
            run(settings(tmp_path, "s.tar"), tmp_path / "cache", vae)
    assert fingerprint(make_vae(sample_size=99)) == fingerprint(VAE)                # the sample size does not affect the latents


def test_a_folder_of_other_files_is_not_written_into(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 3))
    with pytest.raises(ValueError, match="s.tar.*name another folder"):
        run(settings(tmp_path, "s.tar"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


@pytest.mark.parametrize("name", ["settings.json", "decoded.png"])
def test_a_file_that_was_half_written_at_a_kill_is_no_other_file(tmp_path, name):
    (tmp_path / f".writing-{name}").touch()
    prepare.check_folder(tmp_path)


def test_a_run_on_a_cache_takes_settings_from_it(tmp_path):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", {str(k): {"png": picture(k), "json": b'{"a": "x", "b": "y"}'} for k in range(3)})
    made = settings(tmp_path, "s-0.tar:0.25", "s-1.tar:0.75", caption_key=["a:0.9", "b:0.1"], flip=True, min_side=3)
    cache = run(made, tmp_path / "cache")
    plain = make_config(resolution=8, vae_weights="the VAE")
    config = prepare.adopt(plain, cache, VAE)
    assert (config.data.sources, config.data.caption_key) == (made.data.sources, made.data.caption_key)
    assert (config.data.flip, config.data.min_side) == (True, 3)
    other = prepare.adopt(settings(tmp_path, "s-0.tar:0.5", "s-1.tar:0.5", caption_key=["a:0.2", "b:0.8"]), cache, VAE)
    assert other.data.caption_key == ["a:0.2", "b:0.8"] and other.data.sources[0].endswith("s-0.tar:0.5")
    with pytest.raises(ValueError, match="has a b"):
        prepare.adopt(settings(tmp_path, "s-0.tar", caption_key=["b"]), cache, VAE)
    with pytest.raises(ValueError, match="resolution 8 in the cache, 16 in this run"):
        prepare.adopt(make_config(resolution=16, vae_weights="the VAE"), cache, VAE)
    other = make_vae(scaling_factor=0.5)
    with pytest.raises(ValueError, match="vae .* in the cache"):
        prepare.adopt(plain, cache, other)


def test_a_run_on_a_cache_refuses_other_data(tmp_path):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    cache = run(settings(tmp_path, "s-0.tar:0.7", "s-1.tar:0.3"), tmp_path / "cache")
    swapped = prepare.adopt(settings(tmp_path, "s-1.tar:0.99", "s-0.tar:0.01"), cache, VAE)
    assert [word.rpartition("-")[2] for word in swapped.data.sources] == ["0.tar:0.01", "1.tar:0.99"]      # in the cache's order
    with pytest.raises(ValueError, match="was made from .*s-0.tar:0.7 .*leave it out"):
        prepare.adopt(settings(tmp_path, "s-0.tar:0.5", "s-2.tar:0.5"), cache, VAE)


def test_shards_of_other_settings_are_encoded_again(tmp_path, encoded):
    """Such shards come from an older job that is still running while the cache is rebuilt."""
    shard(tmp_path / "s.tar", numbered(0, 12))
    run(settings(tmp_path, "s.tar"), tmp_path / "cache")
    run(settings(tmp_path, "s.tar", max_caption=9), tmp_path / "other")
    shutil.rmtree(tmp_path / "cache" / "shards")
    shutil.copytree(tmp_path / "other" / "shards", tmp_path / "cache" / "shards")
    assert len(run(settings(tmp_path, "s.tar"), tmp_path / "cache")) == 12 and len(encoded) == 3


def test_rebuilding_a_cache_that_is_already_rebuilt_encodes_nothing(tmp_path, encoded):
    shard(tmp_path / "s.tar", numbered(0, 3))
    run(settings(tmp_path, "s.tar"), tmp_path / "cache")
    for _ in range(2):
        run(settings(tmp_path, "s.tar", flip=True), tmp_path / "cache", rebuild=True)
    assert encoded == ["s.tar", "s.tar"]


def test_one_shard_in_two_sources_is_refused_before_anything_is_encoded(tmp_path, encoded):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    with pytest.raises(ValueError, match="s-1.tar and .*both name .*s-1.tar"):
        run(settings(tmp_path, "s-*:0.5", "s-1.tar:0.5"), tmp_path / "cache")
    assert not encoded


def test_shards_that_are_no_longer_named_are_mentioned_and_left_out(tmp_path, capsys):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    run(settings(tmp_path, "s-*"), tmp_path / "cache")
    capsys.readouterr()
    assert len(run(settings(tmp_path, "s-0.tar"), tmp_path / "cache")) == 3
    assert "also holds 1 that --data does not name" in capsys.readouterr().out


def test_pictures_in_buckets_fit_the_network_they_are_for(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 3))
    cache = run(settings(tmp_path, "s.tar", buckets=2.0, network="dit", dit={"patch": 1}), tmp_path / "cache")
    assert prepare.adopt(make_config(resolution=8, vae_weights="v", network="dit", dit={"patch": 1}), cache, VAE).data.buckets == 2.0
    with pytest.raises(ValueError, match="multiples of 2 pixels, this network takes multiples of 4"):
        prepare.adopt(make_config(resolution=8, vae_weights="v", network="dit", dit={"patch": 2}), cache, VAE)


def test_several_captions_of_a_picture_are_all_kept_with_their_kinds(tmp_path):
    samples = {"0": {"png": picture(0), "json": b'{"dense": "a long caption", "short": ["one", "two"]}'},
               "1": {"png": picture(1), "json": b'{"short": "only short"}'}}
    shard(tmp_path / "s.tar", samples)
    cache = run(settings(tmp_path, "s.tar", caption_key=["dense:0.7", "short:0.3"]), tmp_path / "cache")
    assert [cache.captions(i) for i in range(2)] == [[(0, "a long caption"), (1, "one"), (1, "two")], [(1, "only short")]]


def test_the_batch_that_encodes_never_reaches_beyond_a_shard(tmp_path):
    """Otherwise a shard's bytes would depend on its neighbours."""
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(5 * i, 5))
    run(settings(tmp_path, "s-*"), tmp_path / "both")
    run(settings(tmp_path, "s-1.tar"), tmp_path / "one")
    both, one = ({name: data for name, data in contents(tmp_path / folder / "shards").items() if name.startswith("s-1")}
                 for folder in ("both", "one"))
    assert both == one and len(one) >= 5


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


def test_some_pictures_come_evenly_from_all_shards(tmp_path):
    for i in range(4):
        shard(tmp_path / f"s-{i}.tar", numbered(100 * i, 10 if i else 1))
    items, faults = prepare.some_pictures(settings(tmp_path, "s-*"), 13)
    assert [int(item.captions[0][1].split()[1]) // 100 for item in items] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3] and not faults
    items, _ = prepare.some_pictures(settings(tmp_path, "s-*"), 1000)
    assert len(items) == 31


def test_taking_a_few_pictures_does_not_read_all_shards(tmp_path, monkeypatch):
    for i in range(10):
        shard(tmp_path / f"s-{i}.tar", numbered(100 * i, 60))
    decoded, real = [], encoding.decode_with_sizes
    monkeypatch.setattr(encoding, "decode_with_sizes", lambda data, framing: decoded.append(0) or real(data, framing))
    items, _ = prepare.some_pictures(settings(tmp_path, "s-*"), 2)
    assert [int(item.captions[0][1].split()[1]) for item in items] == [0, 500] and len(decoded) < 40
