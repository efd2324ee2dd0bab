"""Metrics of sets of pictures, by evaluate.py: what they print and write, and what is refused."""

import json

import numpy as np
import pytest
import torch
from helpers import load_script
from PIL import Image
from small_models import unet_model
from stand_in_towers import MISSING, Tokens, Words, thumbnail_towers, write

from tinyldm.cli import guard
from tinyldm.evaluation import picture_metrics, statistics
from tinyldm.evaluation.curve import Point, draw_curve, ticks
from tinyldm.evaluation.distances import Frechet, kid, precision_recall
from tinyldm.evaluation.generation import scales
from tinyldm.evaluation.towers import TOWERS
from tinyldm.folders.save import save_model
from tinyldm.pipeline import DrawSettings

evaluate = load_script("evaluate")


@pytest.fixture(autouse=True)
def towers(monkeypatch):
    for name, tower in thumbnail_towers().items():
        monkeypatch.setitem(TOWERS, name, tower)


@pytest.fixture
def sets(tmp_path):
    return write(tmp_path / "drawn", 40, 1), write(tmp_path / "real", 50, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made, path = unet_model(), tmp_path_factory.mktemp("models") / "model"
    save_model(path, net=made.net, vae=made.vae, texts=[encoder.module for encoder in made.text.encoders],
               tokenizers=made.text.tokenizers, scheduler=made.scheduler, defaults={"steps": 2, "cfg": 2.0})
    return path


def run(*words, weights=("inception=here", "clip=here", "cmmd=here", "dinov2=here")) -> int:
    """evaluate.py in this process -> its exit code."""
    try:
        words = [*words, *(("--weights", *weights) if weights else ())]
        evaluate.ARGS = evaluate.parse([*map(str, words), "--device", "cpu"])
        guard(evaluate.main)
    except SystemExit as end:
        return end.code
    return 0


def thumbnails(folder) -> np.ndarray:
    """The features of a folder's pictures, in the order of the hashes of their pixels, float64."""
    from tinyldm.evaluation.picture_sets import keys_of
    from tinyldm.evaluation.towers import features, open_tower

    images = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    rows = features(open_tower("inception", "here"), images).double().numpy()
    return rows[np.argsort(keys_of(images))]


# ---------------------------------------------------------------- pictures that are there


def test_every_metric_is_the_arithmetic_on_the_towers_features(sets, tmp_path, capsys):
    drawn, real = sets
    assert run(drawn, "--metric", "fid,kid,precision_recall,is,cmmd,fd_dino", "--reference", real, "--out", tmp_path / "out") == 0
    x, y = map(thumbnails, sets)
    records = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("fid", "kid", "precision_recall", "is")}
    values = {name: record["results"][0]["values"] for name, record in records.items()}
    gaussians = [statistics.Gaussian(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)]
    assert values["fid"]["FID"]["value"] == pytest.approx(Frechet(gaussians[1]).to(gaussians[0]), rel=1e-6)
    low, high = values["fid"]["FID"]["interval"]
    assert low < values["fid"]["FID"]["value"] < high
    assert values["kid"]["of all x 1000"]["value"] == pytest.approx(1000 * kid(x, y).all_pairs.value, rel=1e-6)
    assert [values["precision_recall"][name]["value"] for name in ("precision", "recall", "density", "coverage")] == pytest.approx(
        [each.mean() for each in precision_recall(y, x)])
    record = records["fid"]
    assert (record["tower"], record["weights"], record["resize"], record["reference_count"], record["results"][0]["count"]) == (
        "inception", "here", "tensorflow1", 50, 40)
    out = capsys.readouterr().out
    assert "resize tensorflow1" in out and "FID of few pictures is too high: compare it at equal numbers, or FID-infinity" in out


def test_order_and_batch_size_change_no_number(sets, tmp_path):
    drawn, real = sets
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for i, file in enumerate(sorted(drawn.glob("*.png"))):
        (shuffled / f"{(7 * i) % 40:03d}.png").write_bytes(file.read_bytes())
    found = []
    for folder, batch in ((drawn, 50), (drawn, 3), (shuffled, 7)):
        out = tmp_path / f"{folder.name}{batch}"
        assert run(folder, "--metric", "fid,kid,precision_recall,cmmd", "--reference", real, "--batch-size", batch, "--out", out) == 0
        columns = [value for name in ("fid", "kid", "precision_recall", "cmmd")
                   for value in json.loads((out / f"{name}.json").read_text())["results"][0]["values"].values()]
        found.append(np.hstack([np.hstack([*value.values()]) if isinstance(value, dict) else value for value in columns]))
    assert len(found[0]) == 3 * 7 + 2 + 2 and np.allclose(found[0], found[1], rtol=1e-5) and np.allclose(found[0], found[2], rtol=1e-5)


def test_statistics_that_were_written_take_the_pictures_place(sets, tmp_path):
    drawn, real = sets
    assert run(real, "--metric", "stats", "--out", tmp_path / "stats") == 0
    file = tmp_path / "stats" / "inception.npz"
    for reference, out in ((real, "a"), (file, "b")):
        assert run(drawn, "--metric", "fid,kid", "--reference", reference, "--out", tmp_path / out) == 0
    for name in ("fid", "kid"):
        one, two = (json.loads((tmp_path / out / f"{name}.json").read_text())["results"][0]["values"] for out in ("a", "b"))
        assert one == two


def test_a_reference_of_another_resize_or_without_pictures_is_refused_with_the_reason(sets, tmp_path, capsys):
    drawn, real = sets
    assert run(real, "--metric", "stats", "--tower", "inception-clean", "--out", tmp_path) == 0
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(4), sigma=np.eye(4))
    for words, message in ((["fid", "--reference", tmp_path / "inception-clean.npz"], "made with tower inception-clean"),
                           (["kid", "--reference", tmp_path / "theirs.npz"], "theirs.npz holds only mean and covariance"),
                           (["fid", "--reference", tmp_path / "narrow.npz"], "features of 12 and of 4 numbers"),
                           (["fid", "--reference", tmp_path / "gone.npz"], "there is no such file"), (["fid"], "no --reference")):
        assert run(drawn, "--metric", *words, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert run(drawn, "--metric", "fid", "--reference", tmp_path / "theirs.npz", "--out", tmp_path / "out") == 0
    assert "an unknown number of pictures" in capsys.readouterr().out
    assert run(drawn, "--metric", "fid", "--fid-resize", "clean", "--reference", tmp_path / "inception-clean.npz", "--out", tmp_path) == 0


def test_without_weights_a_metric_says_in_one_line_how_to_get_them_and_the_others_run(sets, tmp_path, capsys):
    drawn, real = sets
    assert run(drawn, "--metric", "fid,cmmd,clip", "--reference", real, "--out", tmp_path / "out", weights=("cmmd=here",)) == 2
    assert [file.name for file in (tmp_path / "out").glob("*.json")] == ["cmmd.json"]
    errors = capsys.readouterr().err.splitlines()
    assert sum(MISSING in line for line in errors) == 2 and errors[-1] == "error: not measured, for the reasons above: fid, clip"


def test_pictures_of_mixed_sizes_are_measured_each_at_its_own(tmp_path):
    mixed = write(tmp_path / "mixed", 12, 1, sizes=((16, 16), (20, 12), (9, 9)))
    assert run(mixed, "--metric", "is", "--out", tmp_path / "a") == 0
    assert json.loads((tmp_path / "a" / "is.json").read_text())["results"][0]["count"] == 12
    assert run(mixed, "--metric", "stats", "--resolution", 8, "--out", tmp_path / "b") == 0
    with np.load(tmp_path / "b" / "inception.npz") as found:
        assert found["fact_pixels"] == "8"


@pytest.mark.parametrize("words, message", [
    (["--metric", "prompts"], "metric 'prompts' measures a model that draws: name it as RUN, in place of pictures"),
    (["--metric", "is", "--steps", "3"], "--steps is for models"),
    (["--metric", "is", "--captions", "a.txt"], "--captions is for a model"), (["--metric", "geneval"], "name a model"),
    (["--metric", "geneval", "--count", "4"], "four pictures of each prompt"),
    (["--metric", "is", "--fid-resize", "cleen"], "did you mean 'clean'"),
    (["--metric", "is", "--replicates", "1"], "two bootstrap replicates"),
    (["--metric", "is", "--resolution", "0"], "--resolution 0"), (["--metric", "stats", "--tower", "dino"], "did you mean 'dinov2'")])
def test_what_cannot_be_measured_of_pictures_is_refused(sets, tmp_path, capsys, words, message):
    assert run(sets[0], *words, "--out", tmp_path / "out", weights=()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_part_of_the_reference_is_measured_as_the_part_that_it_is(sets, tmp_path):
    whole, part = (tmp_path / name for name in ("whole", "part"))
    assert run(sets[0], "--metric", "fid", "--reference", sets[0], "--out", whole) == 0
    assert run(sets[0], "--metric", "fid", "--reference", sets[0], "--count", 10, "--out", part) == 0
    found = [json.loads((out / "fid.json").read_text())["results"][0] for out in (whole, part)]
    assert [each["count"] for each in found] == [40, 10]
    assert found[0]["values"]["FID"]["value"] == pytest.approx(0, abs=1e-6) and found[1]["values"]["FID"]["value"] > 0.01


def test_a_size_that_no_picture_is_given_is_refused(model, tmp_path, capsys):
    assert run(model, "--metric", "is", "--resolution", 16, "--out", tmp_path / "out") == 2
    assert "a model draws in its own" in capsys.readouterr().err


def test_a_scale_that_a_network_is_told_has_its_own_name_beside_others():
    told = lambda told, cfg: DrawSettings("euler", "normal", 4, cfg, None, told=told)
    assert scales([told(1.0, 3.5), told(3.5, 3.5)]) == [1.0, 3.5] and scales([told(1.0, 3.5)]) == [3.5]


def test_a_typing_error_in_weights_is_refused(sets, tmp_path, capsys):
    for word, message in (("incepton=here", "did you mean 'inception'"), ("here", "expected TOWER=SOURCE")):
        assert run(sets[0], "--metric", "is", "--out", tmp_path / "out", weights=(word,)) == 2
        assert message in capsys.readouterr().err


def test_an_empty_folder_and_one_picture_are_refused(tmp_path, capsys):
    one = write(tmp_path / "one", 1, 1)
    (tmp_path / "empty").mkdir()
    assert run(one, "--metric", "is", "--out", tmp_path / "out") == 2
    assert "1 pictures have no covariance: give two or more" in capsys.readouterr().err
    assert run(tmp_path / "empty", "--metric", "is", "--out", tmp_path / "out") == 2
    assert "neither a run, a model folder nor" in capsys.readouterr().err
    assert run(one, "--metric", "fid", "--reference", tmp_path / "empty", "--out", tmp_path / "out") == 2
    assert "empty" in capsys.readouterr().err


def test_equal_pictures_have_numbers(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name / f"{i}.png")
    assert run(tmp_path / "a", "--metric", "fid,kid,is,precision_recall", "--reference", tmp_path / "b", "--out", tmp_path / "out") == 0
    values = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text())["results"][0]["values"] for name in ("fid", "is")}
    assert values["fid"]["FID"]["value"] == 0 and values["is"]["IS"] == pytest.approx({"mean": 1, "std": 0})


# ---------------------------------------------------------------- a model, at several guidance scales


def test_a_model_is_drawn_once_for_all_metrics_at_every_scale_and_the_curve_is_drawn(sets, model, tmp_path, capsys, monkeypatch):
    (tmp_path / "captions.txt").write_text("\n".join(f"a {colour} picture" for colour in ("red", "green", "blue")))
    monkeypatch.setattr(picture_metrics, "load_text", lambda source, device: Words())
    monkeypatch.setattr(picture_metrics, "load_tokenizer", lambda source: Tokens(len))
    from tinyldm.evaluation import generation
    real, calls = generation.draw, []
    monkeypatch.setattr(generation, "draw", lambda *args: calls.append(args) or real(*args))
    assert run(model, "--metric", "fid,clip", "--reference", sets[1], "--captions", tmp_path / "captions.txt", "--num", 6,
               "--cfg", "1.5,3,5", "--batch-size", 4, "--out", tmp_path / "out", "--dtype", "fp32") == 0
    assert [(settings.cfg, len(prompts)) for _, prompts, _, settings in calls] == [(cfg, n) for cfg in (1.5, 3, 5) for n in (4, 2)]
    out = capsys.readouterr().out
    lines = [line.split()[:3] for line in out.splitlines() if line.startswith("cfg ")]
    assert lines == 2 * [["cfg", cfg, "6"] for cfg in ("1.5", "3", "5")]
    record = json.loads((tmp_path / "out" / "fid.json").read_text())
    assert [(row["cfg"], row["steps"], row["seed"], row["count"]) for row in record["results"]] == [(cfg, 2, 0, 6) for cfg in (1.5, 3, 5)]
    assert len({row["values"]["FID"]["value"] for row in record["results"]}) == 3
    assert record["resolution"] == 16 and record["reference_pixels"] == "16"
    assert np.asarray(Image.open(tmp_path / "out" / "curve.png")).shape == (720, 960, 3)
    calls.clear()
    assert run(model, "--metric", "is", "--captions", tmp_path / "captions.txt", "--num", 6, "--cfg", "3", "--out", tmp_path / "out",
               "--dtype", "fp32") == 0
    assert calls == []                                      # the pictures of the first call are there


def test_the_clip_score_is_100_times_the_mean_cosine_where_it_is_positive(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_metrics, "load_text", lambda source, device: Words())
    monkeypatch.setattr(picture_metrics, "load_tokenizer", lambda source: Tokens(lambda words: int(words.split()[-1])))
    assert run(sets[0], "--metric", "clip", "--out", tmp_path / "out", "--batch-size", 7) == 0
    from tinyldm.evaluation.towers import features, open_tower
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(sets[0].glob("*.png"))])
    rows, words = features(open_tower("clip", "here"), images).double(), Words()(torch.arange(40)[:, None]).pooled.double()
    scores = 100 * torch.cosine_similarity(rows, words).clamp(min=0).numpy()
    found = json.loads((tmp_path / "out" / "clip.json").read_text())["results"][0]["values"]["CLIP score"]
    assert found["value"] == pytest.approx(scores.mean(), rel=1e-5) and (scores == 0).any() and (scores > 0).any()
    assert found["interval"][1] - found["value"] == pytest.approx(1.959964 * scores.std(ddof=1) / 40**0.5, rel=1e-5)


def test_each_tower_takes_its_own_statistics_or_else_the_pictures(sets, tmp_path):
    drawn, real = sets
    half = write(tmp_path / "half", 25, 4)
    assert run(half, "--metric", "stats", "--out", tmp_path) == 0
    assert run(drawn, "--metric", "fid,fd_dino", "--reference", tmp_path / "inception.npz", real, "--out", tmp_path / "out") == 0
    counts = [json.loads((tmp_path / "out" / f"{name}.json").read_text())["reference_count"] for name in ("fid", "fd_dino")]
    assert counts == [25, 50]


def test_a_metric_of_one_scale_refuses_several(model, capsys):
    assert run(model, "--metric", "prompts", "--cfg", "1,2", weights=()) == 2
    assert "metric 'prompts' measures one at a time" in capsys.readouterr().err


def test_a_model_whose_data_is_unknown_needs_captions(model, tmp_path, capsys):
    assert run(model, "--metric", "is", "--out", tmp_path / "out") == 2
    assert "name a file of them or a data set with --captions" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the curve


@pytest.mark.parametrize("values, wanted", [([1, 9], [0, 2, 4, 6, 8, 10]), ([0.312, 0.334], [0.31, 0.32, 0.33, 0.34]), ([7, 7], [6, 8]),
                                            ([-3, 12], [-5, 0, 5, 10, 15]), ([0, 0], [0, 0.5])])
def test_ticks_are_round_and_include_all_values(values, wanted):
    assert ticks(values) == pytest.approx(wanted)


def test_the_points_of_a_curve_lie_where_their_values_are():
    image = draw_curve([Point(20, 10, "a"), Point(30, 40, "b")], "x", "y")
    blue = (image == (40, 90, 200)).all(-1)
    rows, columns = np.nonzero(blue)
    assert (columns.min(), columns.max()) == pytest.approx((2 * 60 - 8, 2 * 460 + 8), abs=1)       # the margins, and the dots' radius
    assert (rows.min(), rows.max()) == pytest.approx((2 * 20 - 8, 2 * 316 + 8), abs=1)
    assert blue[2 * 168, 2 * 260 - 6:2 * 260 + 6].any()                                           # the middle of the line
