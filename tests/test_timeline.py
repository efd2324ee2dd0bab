"""docs/timeline.md: every function that it names exists, and every command runs."""

import ast
import re
import shlex
import subprocess
import sys

import pytest

from helpers import ROOT
from tinyldm.evaluation.recogniser import cache_folder, get_recogniser

PAGE = (ROOT / "docs" / "timeline.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py):(\w+)`", PAGE)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.replace("\\\n", " ").splitlines()]
# What makes a command of each script take seconds: it runs, and the pictures are noise.
SMALL = {
    "train.py": "--scenes 64 --vae-pictures 64 --vae-steps 4 --batch-size 8 --save-every 1000 --sample-every 0 --sample-steps 2 --val-samples 8",
    "evaluate.py": "--count 8",
    "examples/vae_prior.py": "--size 16",
    "examples/d3pm.py": "--steps 2 --length 4 --side 8",
    "examples/classifier_guidance.py": "--steps 2",
}


@pytest.mark.parametrize("file, name", sorted(set(NAMED)))
def test_functions_are_where_the_page_says(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_page_names_a_function_for_every_entry_and_a_command_for_nearly_all():
    entries = re.findall(r"^\*\*\d{4}, .*?(?=^\*\*\d{4}, |^## |\Z)", PAGE, re.S | re.M)
    assert len(entries) > 30 and all(re.search(r"`[\w/]+\.py:\w+`", entry) for entry in entries)
    assert len(COMMANDS) >= len(entries)


@pytest.mark.slow
def test_every_command_of_the_page_runs_in_a_small_setting(tmp_path):
    """In the order of the page, but for runs/tiny and runs/v, on which others build."""
    get_recogniser()                                        # the teacher of two of them
    failed, first = [], [line for line in COMMANDS if line.endswith(("--out runs/tiny", "--out runs/v"))]
    for line in [*first, *(line for line in COMMANDS if line not in first)]:
        program, script, *words = shlex.split(line.replace("~/.cache/tinyldm", str(cache_folder())))
        assert program == "python"
        words += shlex.split(SMALL.get(script, "")) + (["--max-steps", "2"] if script == "train.py" else [])
        done = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            failed.append(f"{line}\n{done.stderr[-1000:]}")
    assert not failed, "\n\n".join(failed)
