"""The page of a run: what is in it, and what it copes with."""

import datetime
import html
import json
import math
import os
import re
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from reports import data_of, full_row, losses, make_run

from tinyldm.config import flatten, make_config, preset_config
from tinyldm.training.report import EVENTS, POINTS, running_hours, thin, write_report

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- what is in it


def test_the_page_is_one_well_formed_file_that_loads_nothing_from_elsewhere(tmp_path):
    class Reader(HTMLParser):
        open_tags, addresses = [], []

        def handle_starttag(self, tag, attributes):
            self.addresses += [value for name, value in attributes if name in ("src", "href")]
            if tag not in ("meta", "link", "input", "img", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    page = write_report(make_run(tmp_path / "one", losses(5)))
    assert page == tmp_path / "one" / "report.html"
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open_tags == [] and reader.addresses == ["data:,"]
    text = page.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\((?!#)|@(TITLE|DATA|REFRESH)@", text)
    assert not list(page.parent.glob(".writing*"))


def test_curves_events_and_plan_come_from_the_log(tmp_path):
    rows = [{"stage": "vae", "step": 10, "loss": 0.5, "seconds": 36.0},
            {"stage": "step", "step": 200, "event": "plan", "text": "measured", "total_steps": 1000, "decay_from": 700,
             "finish": "2026-11-27 10:00"},
            *losses(3, t_bins=[0.1, None, 0.3], grad_norm=2.0),
            {"stage": "step", "step": 300, "event": "plan", "total_steps": 1100, "decay_from": 800, "finish": "2026-11-28"},
            {"stage": "step", "step": 301, "event": "skipped", "text": "gradients are not finite"}]
    data = data_of(write_report(make_run(tmp_path, rows)))
    assert list(data["stages"]) == ["vae", "step"]
    step = data["stages"]["step"]
    assert step["plan"] == {"total": 1100, "decay_from": 800, "warmup": 50, "finish": "2026-11-28"} and step["step"] == 301
    assert step["curves"]["loss"] == {"x": [1, 2, 3], "y": [1, 0.5, 0.333333], "bad": []}
    assert set(step["curves"]) == {"loss", "grad_norm"}
    assert [curve["y"] for curve in step["bins"]["t_bins"]] == [[0.1] * 3, [], [0.3] * 3]
    assert [(event["event"], event["step"]) for event in data["events"]] == [("plan", 200), ("plan", 300), ("skipped", 301)]
    assert data["events"][0]["total_steps"] == 1000 and data["events"][2]["text"] == "gradients are not finite"


def test_without_a_plan_the_settings_say_it(tmp_path):
    stages = data_of(write_report(make_run(tmp_path, [{"stage": "vae", "step": 10}, *losses(1)])))["stages"]
    assert stages["step"]["plan"] == {"total": 850, "decay_from": 510, "warmup": 50, "finish": None}
    assert stages["vae"]["plan"] == {"total": 950, "decay_from": 380, "warmup": 50, "finish": None}


def test_running_time_adds_up_over_processes_and_stages():
    rows = [{"stage": "vae", "step": i, "seconds": s} for i, s in enumerate((1800, 3600, 900, 1800))]
    hours = running_hours([*rows, {"stage": "step", "step": 1, "seconds": 3600}, {"stage": "step", "step": 2, "seconds": 600},
                           {"stage": "step", "step": 3}])
    assert hours["vae"]["y"] == [0.5, 1, 1.25, 1.5]
    assert hours["step"]["y"] == [2, round(2 + 1 / 6, 5)]


def test_running_time_that_a_row_says_is_believed_and_other_rows_go_on_from_there():
    rows = [{"stage": "vae", "step": 1, "seconds": 1800}, {"stage": "vae", "step": 2, "seconds": 3600, "running": 7200},
            {"stage": "step", "step": 1, "running": 10_800}, {"stage": "step", "step": 2, "seconds": 1800},
            {"stage": "step", "step": 3, "seconds": 3600, "running": math.nan}]
    hours = running_hours(rows)
    assert hours["vae"]["y"] == [0.5, 2] and hours["step"]["y"] == [3, 3.5, 4]


def test_a_run_that_ends_by_time_says_how_much_it_has(tmp_path):
    def time(**settings):
        config = flatten(preset_config("tiny", max_steps=0)) | settings
        return data_of(write_report(make_run(tmp_path / str(len(list(tmp_path.iterdir()))), losses(1), config)))["time"]

    noon = datetime.datetime(2030, 1, 31, 12).timestamp()
    assert time(budget="7d") == {"hours": 168} and time(deadline="2030-01-31T12:00") == {"ends": noon}
    assert time(budget="1h30m", deadline="2030-01-31T12:00") == {"hours": 1.5, "ends": noon}
    assert time() == time(budget="soon", deadline="later") == time(budget=7, deadline=None) == {}


def test_events_of_all_kinds_and_curves_of_all_names_reach_the_page(tmp_path):
    events = [{"event": "stage", "text": "from here on 512 px", "resolution": 512}, {"event": "spike", "text": "loss 3 is far up"},
              {"event": "rollback", "text": "back to step 1"}, {"event": "memory", "text": "micro-batch 8, accumulation 4"}]
    rows = [{"stage": "step", "step": i, **event} for i, event in enumerate(events, 1)]
    data = data_of(write_report(make_run(tmp_path, rows + losses(2, update_ratio=0.001, mfu=0.5, memory_gb=27.5, running=60.0))))
    assert data["events"] == rows
    assert {"update_ratio", "mfu", "memory_gb"} < set(data["stages"]["step"]["curves"])


def test_settings_show_where_they_leave_the_preset(tmp_path):
    config = flatten(preset_config("tiny_dit", lr=0.5)) | {"of_tomorrow": [1]}
    found = {one["name"]: one for one in data_of(write_report(make_run(tmp_path, config=config)))["config"]}
    assert [name for name, one in found.items() if one["differs"]] == ["lr"]
    assert (found["lr"]["value"], found["lr"]["usual"]) == ("0.5", "0.002") and "AdamW" in found["lr"]["help"]
    assert found["of_tomorrow"]["usual"] is None and found["dit"]["value"].startswith('{"patch": 1')


def test_data_as_old_runs_say_it_is_no_difference(tmp_path):
    config = flatten(preset_config("tiny")) | {"data": "toyworld"}
    assert not any(one["differs"] for one in data_of(write_report(make_run(tmp_path, config=config)))["config"])


def test_sample_grids_are_linked_in_order_of_steps(tmp_path):
    run = make_run(tmp_path, samples=("step-1000000.png", "step-000500.png", "vae.png", "step-000020.png", "a #1 ü.png"))
    data = data_of(write_report(run))
    assert [one["step"] for one in data["samples"]] == [None, None, 20, 500, 1_000_000]
    assert [one["src"] for one in data["samples"]][:2] == ["samples/a%20%231%20%C3%BC.png", "samples/vae.png"]


def test_the_environment_of_the_caller_comes_with_the_versions(tmp_path):
    environment = data_of(write_report(make_run(tmp_path), {"gpu": "one card", "ranks": 3}))["environment"]
    assert environment["gpu"] == "one card" and environment["ranks"] == "3"
    assert environment["python"] == ".".join(map(str, sys.version_info[:3])) and {"torch", "platform"} <= set(environment)


def test_the_page_is_refreshed_until_the_run_is_finished(tmp_path):
    def refreshed(name, rows, checkpoints, config=None):
        return 'http-equiv="refresh"' in write_report(make_run(tmp_path / name, rows, config, checkpoints)).read_text()

    end = {"step-000850": {"finished": True}}
    assert refreshed("begun", [], {})
    assert refreshed("going", losses(9), {"step-000500": {"finished": False}})
    assert refreshed("vae", [], {"vae-000950": {"finished": True}})
    assert not refreshed("done", losses(9), end)
    longer = flatten(preset_config("tiny", max_steps=1700))
    assert refreshed("longer", losses(9), end, longer)
    assert refreshed("taken up", [*losses(9), {"stage": "step", "step": 860}], end)
    plan = {"stage": "step", "step": 200, "event": "plan", "total_steps": 850}
    assert not refreshed("budget", [*losses(9), plan], end, longer)
    week = flatten(preset_config("tiny", max_steps=0, budget="7d"))
    assert refreshed("week", losses(9), {"step-000850": {"finished": False}}, week)
    assert not refreshed("week, over", losses(9), end, week)
    assert refreshed("two weeks", [*losses(9), {"stage": "step", "step": 870}], end, week)


def test_the_last_step_is_that_of_the_last_checkpoint_when_the_log_ends_before(tmp_path):
    saved = {"step-000850": {"finished": True}, "step-000500": {"finished": False}, "vae-000950": {"finished": True}}
    data = data_of(write_report(make_run(tmp_path, losses(840), checkpoints=saved)))
    assert data["stages"]["step"]["step"] == 850
    assert list(data["stages"]) == ["vae", "step"]
    assert [one["name"] for one in data["checkpoints"]] == ["vae-000950", "step-000500", "step-000850"]


# ---------------------------------------------------------------- what it copes with


def test_a_folder_without_anything_gives_a_page(tmp_path):
    data = data_of(write_report(tmp_path))
    assert data["stages"]["step"]["step"] == 0 and data["config"] == [] and data["samples"] == [] and data["events"] == []


def test_damaged_files_and_rows_leave_gaps(tmp_path):
    strange = [5, None, [], "x", {}, {"step": 1}, {"stage": "step"}, {"stage": 3, "step": 3}, {"stage": "step", "step": None},
               {"stage": "step", "step": math.nan}, {"stage": "step", "step": True}, {"stage": "step", "step": 10**400}]
    values = [{"stage": "step", "step": 7, "loss": value, "t_bins": value, "event": value, "text": value, "seconds": value}
              for value in ("0.5", True, None, {}, [], [None, "x", 2], 10**400, -math.inf)]
    plan = {"stage": "step", "step": 8, "event": "plan", "total_steps": "many", "decay_from": math.nan, "finish": [1]}
    run = make_run(tmp_path, [*strange, *losses(2), *values, plan],
                   checkpoints={"step-000001": "{torn", "step-x": {}, "other": {"finished": True}, "step-000002": "[]"})
    with open(run / "log.jsonl", "a") as file:
        file.write('{"stage": "step", "step": 9, "lo')
    data = data_of(write_report(run))
    assert data["stages"]["step"]["curves"]["loss"]["y"] == [1, 0.5] and data["checkpoints"] == []
    assert data["stages"]["step"]["plan"]["total"] == 850 and data["stages"]["step"]["step"] == 8
    (run / "config.json").write_text("{")
    assert data_of(write_report(run))["config"] == []
    odd = {"preset": math.nan, "max_steps": "x", "lr": math.nan, "decay": None, "sample_prompts": 3}
    (run / "config.json").write_text(json.dumps(odd))
    assert data_of(write_report(run))["stages"]["step"]["plan"]["total"] is None


def test_values_that_are_not_finite_are_marked_and_do_not_reach_the_curve(tmp_path):
    rows = [*losses(3), {"stage": "step", "step": 4, "loss": math.nan}, {"stage": "step", "step": 5, "loss": math.inf}]
    curve = data_of(write_report(make_run(tmp_path, rows)))["stages"]["step"]["curves"]["loss"]
    assert curve["x"] == [1, 2, 3] and curve["bad"] == [4, 5]


def test_numbers_that_were_logged_as_null_are_marked_and_a_value_that_a_row_lacks_is_not(tmp_path):
    rows = [*losses(3), {"stage": "step", "step": 4, "loss": None}, {"stage": "step", "step": 5, "val_ema": 0.5, "val_bins": None}]
    curves = data_of(write_report(make_run(tmp_path, rows)))["stages"]["step"]["curves"]
    assert curves["loss"]["x"] == [1, 2, 3] and curves["loss"]["bad"] == [4] and curves["val_ema"]["bad"] == []


@pytest.mark.parametrize("said", ["</script><script>alert(1)</script>", "<!-- <script>", "\u2028 漢字 ü \U0001f98a", "\ud800",
                                  "@DATA@ @TITLE@"])
def test_whatever_people_write_stays_text(tmp_path, said):
    config = flatten(preset_config("tiny")) | {"sample_prompts": f"a|{said}", "preset": said}
    rows = [{"stage": "step", "step": 1, "event": said, "text": said}, {"stage": said, "step": 1, "loss": 1.0}]
    page = write_report(make_run(tmp_path, rows, config), {said: said})
    data = data_of(page)
    assert data["prompts"] == ["a", said] and data["events"][0]["text"] == said and data["preset"] == said
    assert data["environment"][said] == said and said in data["stages"]
    assert page.read_text(encoding="utf-8").count("<script") == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["<b>&\"run\"", "@DATA@", os.fsdecode(b"not utf-8 \xff")])
def test_a_run_may_have_any_name(tmp_path, name):
    try:
        run = make_run(tmp_path / name, losses(2))
    except OSError:
        pytest.skip("this file system refuses the name")
    page = write_report(run)
    assert data_of(page)["name"] == name
    title = re.search("<title>(.*?) · training run</title>", page.read_text(encoding="utf-8"))[1]
    assert html.unescape(title) == name.replace("\udcff", "?") and "<" not in title


def test_an_old_page_stays_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    page = write_report(make_run(tmp_path, losses(2)))
    before = page.read_bytes()

    def full(path):
        raise OSError("no space left on device")

    monkeypatch.setattr("tinyldm.files.flush", full)
    with pytest.raises(OSError):
        write_report(tmp_path, {"new": "thing"})
    assert page.read_bytes() == before


# ---------------------------------------------------------------- size


def test_thinning_keeps_ends_and_extremes_and_means():
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_003)
    y[[0, 5, 77_777, -1]] = 2.5, 9, -9, 3.5
    curve = thin(range(1, len(y) + 1), y.tolist())
    assert POINTS * 0.9 < len(curve["x"]) <= POINTS + 2 and curve["x"] == sorted(set(curve["x"]))
    points = dict(zip(curve["x"], curve["y"]))
    assert points[1] == 2.5 and points[6] == 9 and points[77_778] == -9 and points[len(y)] == 3.5
    edges = np.linspace(0, len(y), POINTS // 2 + 1).astype(int)
    for low, high, x, mean in zip(edges[:-1], edges[1:], curve["mx"], curve["my"], strict=True):
        inside = [value for step, value in points.items() if low < step <= high]
        part = y[low:high]
        assert min(inside) == pytest.approx(part.min(), rel=1e-5) and max(inside) == pytest.approx(part.max(), rel=1e-5)
        assert mean == pytest.approx(part.mean(), rel=1e-4, abs=1e-5) and x == pytest.approx((low + 1 + high) / 2, rel=1e-4)


def test_short_curves_are_left_as_they_are():
    curve = thin(range(POINTS), [0.5] * POINTS)
    assert curve["x"] == list(range(POINTS)) and "mx" not in curve
    assert "mx" in thin(range(POINTS + 1), [0.5] * (POINTS + 1))


def test_enormous_values_keep_finite_means():
    assert all(map(math.isfinite, thin(range(9000), [1.7e308] * 9000)["my"]))


@pytest.mark.slow
def test_long_logs_make_a_page_under_5_mb(tmp_path):
    rows = [full_row(stage, i) for stage in ("vae", "step") for i in range(1, 6001)]
    events = [{"stage": "step", "step": i, "event": "spike" if i % 10 else "plan", "text": "x" * 1000} for i in range(5000)]
    page = write_report(make_run(tmp_path, rows + events, flatten(make_config()) | {"sample_prompts": "y" * 10**6}))
    data = data_of(page)
    assert 1e6 < page.stat().st_size < 5e6
    kinds = [event["event"] for event in data["events"]]
    assert (kinds.count("plan"), kinds.count("spike"), data["events_left_out"]) == (EVENTS, EVENTS, 5000 - 2 * EVENTS)
    assert data["events"][-1]["step"] == 4999 and len(data["events"][-1]["text"]) == 400


@pytest.mark.slow
def test_a_million_rows_make_a_page_under_5_mb(tmp_path):
    run = make_run(tmp_path)
    with open(run / "log.jsonl", "w") as file:
        for i in range(1, 10**6 + 1):
            file.write(f'{{"stage": "step", "step": {i}, "loss": {i * 7919 % 1000 / 999}, "seconds": {i}}}\n')
    page = write_report(run)
    assert page.stat().st_size < 5e6 and data_of(page)["stages"]["step"]["step"] == 10**6


def test_the_template_is_installed_with_the_package():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["tinyldm.training"].split() == ["report.html"]
    assert (ROOT / "tinyldm" / "training" / "report.html").is_file()


# ---------------------------------------------------------------- an autoencoder alone


STATISTICS = {"mean": [0.5, -1.0], "std": [1.0, 2.0], "correlation": [[1.0, -0.25], [-0.25, 1.0]], "largest_correlation": 0.25,
              "spectrum": [3.0, 0.0004], "picture_spectrum": [20.0, 1.0, 0.1]}


def test_the_newest_statistics_of_latents_are_on_the_page(tmp_path):
    rows = [{"stage": "vae", "step": step, "val_raw": 1 / step, "val_psnr": 20.0 + step, "latents": STATISTICS | {"mean": [step, 0.0]}}
            for step in (10, 20)]
    data = data_of(write_report(make_run(tmp_path, rows)))
    assert data["latents"] == STATISTICS | {"step": 20, "mean": [20.0, 0.0]}
    assert data["stages"]["vae"]["curves"]["val_psnr"]["y"] == [30, 40]
    assert data_of(write_report(make_run(tmp_path / "none", losses(2))))["latents"] is None


@pytest.mark.parametrize("damaged", [{"mean": "x"}, {"mean": [None, 1]}, {"mean": [[1], [2, 3]]}, {"mean": [0.0] * 999}, {"mean": {}}])
def test_damaged_statistics_leave_a_gap(tmp_path, damaged):
    data = data_of(write_report(make_run(tmp_path, [{"stage": "vae", "step": 1, "latents": STATISTICS | damaged}])))
    assert data["latents"].keys() == {"step", *STATISTICS} - {"mean"}


def test_a_run_of_an_autoencoder_alone_is_finished_when_that_is_there(tmp_path):
    run = make_run(tmp_path / "run", [{"stage": "vae", "step": 10, "loss": 0.5}], config=flatten(make_config(only="vae", vae_steps=99)))
    data = data_of(write_report(run))
    assert data["only"] and not data["finished"] and data["stages"]["vae"]["plan"]["total"] == 99
    (run / "vae").mkdir()
    assert data_of(write_report(run))["finished"]
    timed = make_run(tmp_path / "timed", [{"stage": "vae", "step": 10, "loss": 0.5}],
                     config=flatten(make_config(only="vae", budget="1h", max_steps=0, vae_steps=99)))
    assert data_of(write_report(timed))["stages"]["vae"]["plan"]["total"] is None
