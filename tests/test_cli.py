"""What the scripts share at the keyboard."""

import os
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT, load_script, thinned

from tinyldm.cli import BestEffortStream, allow_expandable_segments, guard

NAME = "狐 caf\udce9"                     # no terminal shows the second word, whose last letter is a byte that is not UTF-8
PRINTS = f"""
import sys
from tqdm import tqdm
from tinyldm.cli import Parser, BestEffortStream, best_effort, fail, guard
NAME = {NAME!a}
args = Parser(description=NAME).parse_args(sys.argv[1:])
print(NAME)
tqdm.write(NAME)
sys.stdout, sys.stderr = BestEffortStream(sys.stdout), BestEffortStream(sys.stderr)
print(NAME, flush=True)
best_effort(NAME, lambda: 1 / 0)
for _ in tqdm([1], desc=NAME):
    pass
def main():
    raise ValueError(NAME)
guard(main)
"""


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, cwd=ROOT, env=ENVIRONMENT | environment, check=False)


def test_a_terminal_that_is_gone_is_not_missed(tmp_path):
    stream = open(tmp_path / "output", "w")
    surviving = BestEffortStream(stream)
    print("heard", file=surviving)
    stream.close()
    print("not heard", file=surviving, flush=True)
    assert (tmp_path / "output").read_text() == "heard\n" and surviving.name == stream.name


@pytest.mark.parametrize("environment, fox", [
    ({"PYTHONIOENCODING": "ascii"}, rb"\u72d0"), ({"PYTHONIOENCODING": "cp1252"}, rb"\u72d0"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"\u72d0"), ({"PYTHONIOENCODING": "utf-8"}, "狐".encode())])
def test_what_a_terminal_cannot_show_is_printed_as_an_escape(environment, fox):
    shown = fox + rb" caf\udce9"
    done = run(["-c", PRINTS], **environment)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == b"error: " + shown and shown + b": 100%" in done.stderr
    assert done.stdout.splitlines() == [shown] * 3 + [shown + b" failed, training goes on: division by zero"]
    done = run(["-c", PRINTS, "--help"], **environment)
    assert done.returncode == 0 and shown in done.stdout and not done.stderr
    done = run(["-c", PRINTS, "--speed"], **environment)
    assert done.returncode == 2 and done.stderr.startswith(b"error: unknown argument '--speed'")


@pytest.mark.parametrize("error, advice", [
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_a_lack_of_memory_ends_a_script_with_advice_and_other_errors_with_their_traceback(error, advice, monkeypatch, capsys):
    monkeypatch.delenv("TINYLDM_TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit if advice else type(error)) as raised:
        guard(main)
    assert not advice or raised.value.code == 2
    assert ("error: out of memory: use a smaller --batch-size" in capsys.readouterr().err) == advice


@pytest.mark.parametrize("name", ["sample", "evaluate", "train", "prepare"])
def test_every_script_reads_its_flags_through_the_parser_that_lets_it_print_anything(name, monkeypatch):
    module, called = load_script(name), []
    monkeypatch.setattr("tinyldm.cli.print_anything", lambda: called.append(True))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        module.parse(["--help"], *(("", module.FLAGS, getattr(module, "NAMES", ())) if hasattr(module, "FLAGS") else ()))
    assert called


ENDLESS = """
from tinyldm.cli import guard, outlive_terminal
def main():
    for i in range(10**5):
        print("line", i)
    {end}
{before}
guard(main)
"""


@pytest.mark.parametrize("before, end, code", [("", "", 141), ("", "raise ValueError", 141), ("outlive_terminal()", "", 0),
                                               ("outlive_terminal()", "raise ValueError('of the work')", 2)])
def test_work_that_a_closed_pipe_cuts_does_not_count_as_finished_and_a_long_job_goes_on(before, end, code):
    """As in `python prepare.py | head -1 && python train.py`, with bash's pipefail."""
    job = subprocess.Popen([sys.executable, "-c", ENDLESS.format(before=before, end=end)], cwd=ROOT, env=ENVIRONMENT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout.readline() == b"line 0\n"
    job.stdout.close()
    error = job.stderr.read()
    job.stderr.close()
    assert job.wait() == code and b"Traceback" not in error and error.count(b"error: ") == (code == 2)


def test_the_last_lines_that_a_closed_pipe_does_not_take_count_too():
    """They wait in a buffer until the script ends."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", "from tinyldm.cli import guard; guard(lambda: print('done'))"], cwd=ROOT,
                          env={name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}, stdout=write,
                          stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device here that is always full")
def test_an_error_that_nobody_can_read_ends_with_its_code():
    for before in ("", "outlive_terminal()"):
        code = f"from tinyldm.cli import guard, outlive_terminal; {before}; guard(lambda: int('x'))".replace("; ;", ";")
        with open("/dev/full", "w") as full:
            assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, stderr=full).returncode == 2


@pytest.mark.parametrize("name, words", thinned(3, [("sample.py", ["a red fox"]), ("evaluate.py", ["RUN"]), ("prepare.py", [])]))
def test_long_jobs_outlive_their_terminal(name, words):
    code = ("import runpy, sys, tinyldm.cli as cli\n"
            "cli.guard = lambda main: sys.exit(7 * isinstance(sys.stdout, cli.BestEffortStream) * isinstance(sys.stderr, "
            "cli.BestEffortStream))\n"
            f"sys.argv = ['{name}', *sys.argv[1:]]\nrunpy.run_path('{name}', run_name='__main__')")
    assert run(["-c", code, *words]).returncode == 7


@pytest.mark.parametrize("platform, before, after", [
    ("linux", {}, "expandable_segments:True"), ("win32", {}, None), ("linux", {"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64")])
def test_the_allocator_s_blocks_may_grow_unless_the_environment_says_otherwise(monkeypatch, platform, before, after):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    allow_expandable_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == after
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
