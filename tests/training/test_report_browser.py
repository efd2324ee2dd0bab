"""The page of a run in a browser: that it is drawn, without complaint, and can be worked (slow; needs a Chromium)."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reports import full_row, losses, make_run

from tinyldm.config import flatten, preset_config
from tinyldm.training.report import write_report
from tinyldm.training.schedule import LearningRateSchedule


class Browser:
    """A headless Chromium, driven through its debugging pipe: JSON messages on its file descriptors 3 and 4."""

    START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"

    def __init__(self, program: str, folder: Path):
        import fcntl

        theirs, self.to = os.pipe()
        self.back, ours = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs, ours)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, *map(str, ends), program, "--headless", "--no-sandbox", "--disable-gpu",
             "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"],
            pass_fds=ends, stderr=subprocess.DEVNULL)
        for end in (theirs, ours, *ends):
            os.close(end)
        self.rest, self.count, self.events, self.session = b"", 0, [], {}
        page = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]}
        for part in ("Page", "Runtime", "Log"):
            self.send(f"{part}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        self.send("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            piece = os.read(self.back, 1 << 20)
            assert piece, "the browser has ended"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **params) -> dict:
        self.count += 1
        os.write(self.to, json.dumps({"id": self.count, "method": method, "params": params, **self.session}).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path) -> None:
        self.events.clear()
        self.send("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script: str):
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}.get(key, ord(key[0]))
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def drag(self, x0: float, x1: float, y: float) -> None:
        for kind, x in (("mousePressed", x0), ("mouseMoved", (x0 + x1) / 2), ("mouseMoved", x1), ("mouseReleased", x1)):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def complaints(self) -> list[dict]:
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to), os.close(self.back)


@pytest.fixture
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program or os.name == "nt":
        pytest.skip("no Chromium is installed here (Debian: apt-get install chromium)")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def week(tmp_path):
    rows = [{"stage": "vae", "step": 10, "loss": 0.5}] + [full_row("step", i) for i in range(10, 50_001, 10)]
    plan = {"total_steps": 80_000, "decay_from": 60_000, "finish": "2026-11-27 10:00"}
    rows += [{"stage": "step", "step": 700, "event": "plan", **plan},
             {"stage": "step", "step": 800, "event": "spike", "text": "</script>"},
             {"stage": "step", "step": 900, "loss": math.nan}]
    return make_run(tmp_path / "die Woche <1>", rows, checkpoints={"step-000500": {"finished": False}},
                    samples=("vae.png", "step-000100.png", "step-000200.png", "step-000300.png"))


@pytest.mark.slow
def test_a_browser_loads_every_state_of_a_run_without_complaint(browser, week, tmp_path):
    one = make_run(tmp_path / "one", losses(1), samples=("step-000001.png",))
    bad = make_run(tmp_path / "bad", [{"stage": "step", "step": i, "loss": math.nan, "t_bins": [None]} for i in range(3)])
    (tmp_path / "nothing").mkdir()
    for scheme in ("light", "dark"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for run in (week, one, bad, tmp_path / "nothing", make_run(tmp_path / f"begun {scheme}")):
            browser.open(write_report(run))
            assert browser.complaints() == [], run
            assert browser.run("document.querySelector('h1').textContent") == run.name
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert "NaN" not in browser.run("document.body.innerText + $('charts').innerHTML + $('now').innerHTML")
    browser.open(write_report(bad))
    assert browser.run("charts.map(chart => chart.title)") == ["Loss"]      # with its marks; a curve without data has no chart
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=False)
    browser.open(write_report(week))
    assert browser.run("document.documentElement.scrollWidth <= innerWidth") and browser.complaints() == []


@pytest.mark.slow
def test_in_a_browser_charts_are_drawn_and_the_slider_changes_the_picture(browser, week):
    browser.open(write_report(week))
    titles = browser.run("[...document.querySelectorAll('#charts h3')].map(h => h.textContent)")
    assert len(titles) == 12 and titles[0] == "Loss"
    assert browser.run("[...document.querySelectorAll('svg.plot')].every(s => [...s.querySelectorAll('path.curve')]"
                       ".some(p => p.getBoundingClientRect().width > 100))")
    said = browser.run("document.querySelector('svg.plot').getAttribute('aria-label')")
    assert re.match(r"Loss: loss [\d.]+ at step 50,000", said)
    source = "$('picture').getAttribute('src')"
    assert browser.run(source) == "samples/step-000300.png"
    browser.run("$('slider').focus()")
    browser.press("ArrowLeft")
    assert browser.run(source) == "samples/step-000200.png"
    assert browser.run("$('slider').getAttribute('aria-valuetext')") == "step 200"
    browser.press("Home")
    assert browser.run(source) == "samples/step-000100.png"
    for _ in range(100):
        if browser.run("$('picture').complete && $('picture').naturalWidth") == 40:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the picture did not load")
    browser.run("$('beside').value = 'newest'; $('beside').dispatchEvent(new Event('change'))")
    assert browser.run("$('other').getAttribute('src')") == "samples/step-000300.png"
    assert browser.complaints() == []


@pytest.mark.slow
def test_in_a_browser_keys_and_mouse_zoom_and_a_reload_keeps_it(browser, week):
    page = write_report(week)
    browser.open(page)
    span = "charts[0].b - charts[0].a"
    whole = browser.run(span)
    browser.run("charts[0].svg.focus()")
    browser.press("End", "ArrowLeft")
    first = browser.run("charts[0].at.textContent")
    browser.press("ArrowLeft")
    assert first.startswith("at step") and browser.run("charts[0].at.textContent") != first
    assert browser.run("$('live').textContent").startswith("at step")
    browser.press("Home", "+")
    assert browser.run(span) < 0.7 * whole and browser.run("charts[1].b") == browser.run("charts[0].b")
    browser.press("0")
    assert browser.run(span) == whole
    box = browser.run("(charts[0].svg.scrollIntoView({block: 'center'}), charts[0].svg.getBoundingClientRect().toJSON())")
    browser.drag(box["x"] + box["width"] * 0.3, box["x"] + box["width"] * 0.6, box["y"] + 100)
    assert browser.run(span) == pytest.approx(whole * 0.3 * box["width"] / (box["width"] - 64), rel=0.02)
    browser.run("$('smooth').value = 70; $('smooth').dispatchEvent(new Event('input'))")
    browser.run("$('log').click(); $('slider').value = 1; $('slider').dispatchEvent(new Event('input'))")
    kept = browser.run(span), browser.run("scrollY")
    browser.open(page)
    assert (browser.run(span), browser.run("scrollY")) == kept and kept[1] > 0
    assert browser.run("[$('smooth').value, $('log').checked, $('slider').value]") == ["70", True, "1"]
    browser.run("$('reset').click()")
    assert browser.run(span) == whole and browser.complaints() == []


@pytest.mark.slow
@pytest.mark.parametrize(("total", "warmup", "decay"), [
    (850, 50, 0.4), (100, 80, 0.9), (100, 300, 0.5), (100, 0, 1.0), (100, 10, 0.0), (1, 1, 0.5)])
def test_in_a_browser_the_planned_learning_rate_is_that_of_the_schedule(browser, tmp_path, total, warmup, decay):
    config = flatten(preset_config("tiny", max_steps=total, warmup_steps=warmup, decay=decay))
    browser.open(write_report(make_run(tmp_path, losses(1, lr_factor=1.0), config)))
    line = browser.run("scheduleLine(D.stages.step.plan)")
    drawn = np.interp(range(1, total + 1), line["x"], line["y"])
    schedule = LearningRateSchedule(warmup=warmup, decay=decay, max_steps=total)
    assert drawn == pytest.approx([schedule.factor(step) for step in range(total)], abs=0.012)      # corners lie between two steps
    assert browser.complaints() == []


@pytest.mark.slow
def test_in_a_browser_a_run_that_ends_by_time_shows_what_is_used_and_its_stages(browser, tmp_path):
    config = flatten(preset_config("5090_week"))
    rows = [{"stage": "step", "step": i * 100, "loss": 0.5, "seconds": i * 760.0, "running": i * 760.0} for i in range(1, 361)]
    browser.open(write_report(make_run(tmp_path / "early", rows, config)))
    said = browser.run("$('time').textContent")
    assert said.startswith("3 d 4 h of 7 d used (45 %) · the number of steps is planned once") and "· finish 20" in said
    assert "Time left3.8 d" in browser.run("$('now').textContent")
    budget = "(() => {{ const now = Date.parse(D.written) / 1000; D.time = {{ {} }}; return timeLeft(76); }})()"
    for ends, left in (("hours: 168, ends: now + 5 * 3600", 5), ("hours: 80, ends: now + 5 * 3600", 4), ("ends: now - 1", 0)):
        assert browser.run(budget.format(ends)) == pytest.approx(left)
    rows += [{"stage": "step", "step": 500, "event": "plan", "total_steps": 80_000, "decay_from": 64_000, "finish": "Fri 27 Nov 14:05"},
             {"stage": "step", "step": 20_000, "event": "stage", "text": "from here on 512 px", "resolution": 512},
             {"stage": "step", "step": 21_000, "event": "rollback", "text": "back to step 20,000"}]
    browser.open(write_report(make_run(tmp_path / "planned", rows, config)))
    planned = "step 36,000 of 80,000 planned (45 %) · "
    assert browser.run("$('time').textContent") == f"3 d 4 h of 7 d used (45 %) · {planned}finish Fri 27 Nov 14:05"
    assert browser.run("$('time').querySelector('progress').value") == pytest.approx(0.4524, abs=1e-3)
    texts = "[...document.querySelectorAll('{}')].map(t => t.textContent)"
    assert browser.run(texts.format(".turned")) == ["512 px"] * browser.run("charts.length")
    assert browser.run("[...$('charts').querySelector('svg').querySelectorAll('title')].map(t => t.textContent)") == [
        "stage at step 20,000: from here on 512 px", "rollback at step 21,000: back to step 20,000"]
    assert browser.run(texts.format("#events td.kind")) == ["rollback", "stage", "plan"]
    end = {"step-036000": {"finished": True}}
    browser.open(write_report(make_run(tmp_path / "over", rows, config | {"budget": "", "deadline": "2020-01-31T12:00"}, end)))
    assert browser.run("$('time').textContent") == f"3 d 4 h used · to end by 2020-01-31 12:00 · {planned}finished"
    assert browser.complaints() == []
