"""benchmarks/gpu.py: its page and verdicts, parts that end badly, and, slow, the whole command on a CPU."""

import ast
import re
import subprocess
import sys
import warnings
from collections import Counter
from datetime import date
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ENVIRONMENT, ROOT
from torch.autograd import DeviceType

sys.path.append(str(ROOT / "benchmarks"))

import gpu
from gpu_parts.child import WHOLE
from gpu_parts.findings import FAILED, NO_TIME, NOT_HERE, OFF, OK, VERDICTS, Detail, Finding, Job, Limit, NotPossible, Part, judge, run_checks
from gpu_parts.page import render, slug, table
from gpu_parts.profile import Profile, Work, busy, read_profile, top
from gpu_parts.steps import afterwards, timed_steps
from gpu_parts.waits import ALLOWED, EACH_STEP, LOGGED, counted, unexpected

from tinyldm.config import make_config
from tinyldm.device import runs_on

INFINITE = float("inf")
BAD_PARTS = """
import os, subprocess, sys, time
from pathlib import Path
from gpu_parts.findings import Detail, Finding, NotPossible

def fine(job, report):
    report(Finding("a figure", "1 s", "1 s"))
    report(Detail("A table", "| a |\\n|---|\\n| b |"))

def raises(job, report):
    report(Finding("before the error"))
    raise RuntimeError("CUDA error: an illegal\\nmemory access | was encountered")

def aborts(job, report):
    report(Finding("before the abort"))
    print("terminate called", flush=True)
    os.abort()

def leaves(job, report):
    sys.exit(3)

def hangs(job, report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(job.work, "pid").write_text(str(child.pid))
    print("about to hang")
    time.sleep(600)

def allocator(job, report):
    report(Finding("allocator", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "not set")))

def cannot(job, report):
    raise NotPossible("no NCCL")

def silent(job, report):
    pass
"""


def rows(page: str) -> list[list[str]]:
    """The cells of the page's table of verdicts."""
    lines = page.split("| part | name |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def check_markdown(page: str) -> None:
    """Tables have as many cells in every row as in their head, and code blocks end."""
    assert page.count("```") % 2 == 0
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    assert re.search(r"\*\*\d+ ok, \d+ off, \d+ failed, \d+ not possible here, \d+ no time\*\*\n$", page)


@pytest.fixture
def run_parts(tmp_path, monkeypatch):
    """Runs parts of BAD_PARTS -> {part: (verdict, finding's name, note)}, the page."""
    (tmp_path / "bad_parts.py").write_text(BAD_PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def run(*names: str, minutes: float = 5, seconds: float = 6, jobs: int = 1) -> tuple[list[list[str]], str]:
        parts = [Part(name, f"what {name} shows", f"bad_parts:{name}", 0.1 if name == "hangs" else seconds, jobs == 1) for name in names]
        page = tmp_path / "pages" / "page.md"
        gpu.Run(parts, Job("cpu", "tiny", str(tmp_path), str(tmp_path / "pictures")), page, "a test", minutes, jobs).all()
        text = page.read_text(encoding="utf-8")
        check_markdown(text)
        return rows(text), text
    return run


def test_parts_that_fail_crash_or_hang_leave_the_others_and_what_they_reported_before(run_parts, tmp_path):
    found, page = run_parts("raises", "aborts", "leaves", "cannot", "silent", "hangs", "fine")
    verdicts = [(part, name, verdict) for part, name, _, _, verdict, _ in found]
    assert verdicts == [("raises", "before the error", OK), ("raises", WHOLE, FAILED), ("aborts", "before the abort", OK),
                        ("aborts", WHOLE, FAILED), ("leaves", WHOLE, FAILED), ("cannot", WHOLE, NOT_HERE), ("silent", WHOLE, FAILED),
                        ("hangs", WHOLE, FAILED), ("fine", "a figure", OK)]
    notes = {part: note for part, name, *_, note in found if name == WHOLE}
    assert notes["raises"] == "RuntimeError: CUDA error: an illegal memory access \\| was encountered"
    assert notes["aborts"].startswith("ended by SIGABRT") and "terminate called" in page
    assert notes["leaves"] == "SystemExit: 3" and notes["cannot"] == "no NCCL"
    assert notes["hangs"] == "ended after its 1 seconds: about to hang"
    assert "**3 ok, 0 off, 5 failed, 1 not possible here, 0 no time**" in page and "## A table\n\n| a |" in page
    process = Path("/proc") / (tmp_path / "pid").read_text()               # what the part had started was ended with it
    assert not process.exists() or "Z" in (process / "stat").read_text().split(")")[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has them")
def test_parts_that_train_in_their_own_process_have_the_allocator_of_train_py(run_parts, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert run_parts("allocator")[0][0][2] == "expandable_segments:True"


def test_where_the_sample_grid_failed_the_checkpoint_and_the_loader_are_reported_all_the_same():
    found, config = [], make_config()
    phase = {"config": config, "samples": lambda position: None, "ends": [1.0, 2.0, 3.0, 4.0, 5.0]}
    afterwards(Job("cpu", "tiny", "", ""), found.append, SimpleNamespace(times={"copy": 0.5, "write": 2.0}, phases=[phase]))
    assert [(item.name.partition(":")[0], item.verdict) for item in found] == [
        ("sample grid at the end", FAILED), ("checkpoint", NOT_HERE), ("checkpoint", NOT_HERE), ("loader", OK)]


def test_a_part_that_no_longer_fits_is_listed_and_not_begun(run_parts):
    found, _ = run_parts("fine", "raises", minutes=1, seconds=13)          # ten times as long on a CPU: half of 130 seconds, of 60
    assert [(part, name, verdict) for part, name, _, _, verdict, _ in found] == [
        (name, f"what {name} shows", NO_TIME) for name in ("fine", "raises")]
    assert re.fullmatch(r"\d+ seconds were left, and it may take 130", found[0][-1])


def test_the_page_exists_after_the_first_part_and_names_those_to_come(tmp_path, monkeypatch):
    pages, page = [], tmp_path / "page.md"
    monkeypatch.setattr(gpu, "run_part", lambda part, *_: pages.append(page.exists() and page.read_text()) or "")
    parts = [Part(name, name, "m:f", 1) for name in "abc"]
    gpu.Run(parts, Job("cpu", "tiny", str(tmp_path), ""), page, "a test", 1).all()
    assert pages[0] is False and "Still to come, or cut off: b, c." in pages[1] and "Still to come, or cut off: c." in pages[2]
    assert "Still to come" not in page.read_text()


def test_parts_side_by_side_are_on_the_page_in_the_order_of_the_table(run_parts):
    found, _ = run_parts("aborts", "fine", "cannot", jobs=3)
    assert [row[0] for row in found] == ["aborts", "aborts", "fine", "cannot"]


def test_the_verdict_is_off_outside_of_the_limits_and_where_the_figure_is_no_number():
    limit = Limit(0.5, 2, "the plan")
    assert [judge("x", value, 10, limit).verdict for value in (4.99, 5, 20, 20.01, float("nan"))] == [OFF, OK, OK, OFF, OFF]
    assert judge("x", 5, 10, limit, "s", "median of 3") == Finding("x", "5 s", "10 s (x 0.5 to 2)", OK, "median of 3; the plan")
    assert judge("x", 5, None, limit).verdict == NOT_HERE
    assert judge("x", 0.25, 0.2, Limit(0, 1, ""), "%") == Finding("x", "25 %", "at most 20 %", OFF)
    assert judge("x", 1234.5, 0.2, Limit(1, INFINITE, "")) == Finding("x", "1,234", "at least 0.2", OK)


def test_a_check_that_fails_is_a_finding_and_the_others_of_its_part_run():
    def a_sum(job, report):
        report(Finding("a sum", "2", "2"))

    def on_a_gpu(job, report):
        raise NotPossible("no GPU")

    def broken(job, report):
        raise RuntimeError("CUDNN_STATUS_\nNOT_SUPPORTED")

    found = []
    run_checks(Job("cpu", "tiny", "", ""), found.append, broken, on_a_gpu, a_sum)
    assert found == [Finding("broken", verdict=FAILED, note="RuntimeError: CUDNN_STATUS_ NOT_SUPPORTED"),
                     Finding("on a GPU", verdict=NOT_HERE, note="no GPU"), Finding("a sum", "2", "2")]


def test_the_page_has_all_details_and_verdicts_and_counts_them():
    part = Part("one", "shows", "m:f", 1)
    items = [Finding(f"finding | {verdict}\nsecond line", verdict=verdict) for verdict in VERDICTS]
    page = render("RTX 5090", "python benchmarks/gpu.py", "abc", {part: [*items, Detail("Kernels", table(["a", "b"], [(1, "x|y")], (0,)))]},
                  [], 12.3, date(2030, 1, 2))
    check_markdown(page)
    assert page.startswith("# First run on RTX 5090, 2030-01-02\n") and "commit abc, 12 seconds" in page
    assert [row[4] for row in rows(page)] == list(VERDICTS)
    assert "| a | b |\n|---:|---|\n| 1 | x\\|y |" in page
    assert page.index("## Kernels") < page.index("## Verdicts")


def test_pages_are_named_after_the_gpu():
    names = ("NVIDIA GeForce RTX 5090", "NVIDIA H200", "NVIDIA A100-SXM4-80GB")
    assert [slug(name) for name in names] == ["rtx-5090", "h200", "a100-sxm4-80gb"]


def test_kernels_run_on_later_minor_versions_and_ptx_on_all_later_gpus():
    assert runs_on("sm_120", (12, 0)) and runs_on("sm_80", (8, 6)) and runs_on("sm_90a", (9, 0)) and runs_on("compute_90", (12, 0))
    assert not runs_on("sm_90", (12, 0)) and not runs_on("sm_86", (8, 0)) and not runs_on("compute_80", (7, 5))


def test_the_gpu_is_idle_where_no_kernel_runs():
    """0 to 10, 5 to 15 and 7 to 8 overlap; 15 to 30 is a gap; 30 to 40: busy for 25 of 40."""
    work = [Work("b", 5, 15), Work("a", 0, 10), Work("a", 7, 8), Work("c", 30, 40)]
    assert busy(work) == 25 and Profile(work, 4, 0).idle == pytest.approx(15 / 40) and Profile([], 0, 0).idle == 1
    lines = top(Profile(work, 4, 0), 2).splitlines()
    assert lines[2:] == ["| `a` | 2 | 0.01 | 35.5% |", "| `b` | 1 | 0.01 | 32.3% |"]                 # 11 and 10 of 31


def test_of_a_profile_kernels_count_and_annotations_do_not():
    def event(name, kind, start=0.0, end=1.0, note=False):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=note)

    events = [event("gemm", DeviceType.CUDA, 0, 3), event("Optimizer.step#AdamW.step", DeviceType.CUDA, 0, 9),
              event("step", DeviceType.CUDA, 0, 9, True), event("cudaLaunchKernelExC", DeviceType.CPU), event("aten::mm", DeviceType.CPU),
              event("cuLaunchKernel", DeviceType.CPU), event("cudaStreamSynchronize", DeviceType.CPU)]
    assert read_profile(SimpleNamespace(events=lambda: events), on_gpu=True) == Profile([Work("gemm", 0, 3)], 2, 1)


def test_the_steps_that_are_timed_are_those_after_the_warm_up():
    assert timed_steps(0, [0.0, 100, 101, 103, 106, 110, 200]) == [1, 2, 3]          # steps 3, 4 and 5
    assert timed_steps(1, [0.0, 100, 101, 103]) == [1, 2] and timed_steps(0, [0.0, 100]) == []


def test_a_wait_is_counted_at_the_function_of_the_project_that_waits(monkeypatch):
    """torch warns with these words (c10/cuda/CUDAFunctions.cpp); here a function of the library is made to warn."""
    from tinyldm.training.meter import Meter
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: (modes.append(mode), warnings.warn("synchronizing: a prototype")))
    meter = Meter(torch.device("cpu"))
    meter.sums = SimpleNamespace(tolist=lambda: (warnings.warn("called a synchronizing CUDA operation"), [1.0] * 19)[1], zero_=lambda: None)
    found = Counter()
    with counted(found):
        meter.row(), meter.row()
    assert found == {"tinyldm/training/meter.py row": 2} and modes == ["warn", 0] and not unexpected(found)
    assert unexpected(found + Counter({"train.py accumulate": 3})) == ["train.py accumulate (3x)"]


def test_the_allowed_waits_are_those_of_a_pretended_gpu():
    """tests/training/test_gpu_waits.py asserts that training waits exactly there: "file function: torch's function" and how often."""
    tree = ast.parse((ROOT / "tests" / "training" / "test_gpu_waits.py").read_text(encoding="utf-8"))
    known = [node.value for node in tree.body if isinstance(node, ast.Assign)
             and ast.unparse(node.targets[0]) in ("STEP", "MEASURED", "ROW")]
    pairs = {key.value: value.value for each in known for part in ast.walk(each) if isinstance(part, ast.Dict)
             for key, value in zip(part.keys, part.values)}
    assert len(known) == 3 and {key.partition(":")[0] for key in pairs} == ALLOWED.keys()
    assert sum(pairs.values()) == EACH_STEP + LOGGED            # each place at its most


def test_every_part_of_the_table_has_a_function_and_the_times_fit_their_order():
    for part in gpu.PARTS:
        module, name = part.function.split(":")
        assert callable(getattr(import_module(module), name)), part.name
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)


def test_help_and_the_list_of_parts_answer_without_torch():
    code = ("import sys; sys.path.insert(0, 'benchmarks'); sys.modules['torch'] = None; import gpu; sys.argv = ['gpu.py', '--list']; "
            "gpu.main()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == len(gpu.PARTS), done.stderr


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu_and_every_part_comes_to_a_verdict(tmp_path):
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", tmp_path / "page.md"], cwd=ROOT,
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    check_markdown(page)
    found, by_part = rows(page), {part.name: [] for part in gpu.PARTS}
    for part, name, _, _, verdict, _ in found:
        by_part[part].append((name, verdict))
    assert all(by_part.values()) and "Still to come" not in page
    bad = [row for row in found if row[4] in (OFF, FAILED, NO_TIME)]
    assert not bad, page
    for name in ("numbers", "resume", "signal", "memory", "learning"):     # all that a CPU can show
        assert {verdict for _, verdict in by_part[name]} == {OK}, by_part[name]
    assert Counter(verdict for _, verdict in by_part["processes"]) == {OK: 2, NOT_HERE: 1}
    for title in ("Machine", "One step of the dit at 32 px", "One step of the unet at 32 px", "What 30 seconds of training draw"):
        assert f"## {title}" in page, title
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"drawn.png", "training.png", "vae.png"}
