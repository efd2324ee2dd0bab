"""The house's rules: what may import what, and what happens at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tinyldm/**/*.py")])


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) + "." if node.level else ""
            names.add(package + (node.module or ""))
    return names


def test_nothing_outside_tests_and_benchmarks_imports_diffusers_or_transformers_or_pickle():
    assert len(SOURCES) > 20
    for path in SOURCES:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"diffusers", "transformers", "open_clip", "pickle", "torchvision"}, path


@pytest.mark.parametrize("room, strangers", [
    ("models", ("diffusion", "data", "training", "vendor_loaders", "evaluation", "pipeline", "config")),
    ("diffusion", ("models", "data", "training", "vendor_loaders", "evaluation", "pipeline", "config")),
    ("vendor_loaders", ("data", "training", "evaluation", "pipeline", "config")),
])
def test_imports_point_one_way(room, strangers):
    for path in (ROOT / "tinyldm" / room).glob("*.py"):
        for name in imports(path):
            assert not any(name.startswith(f"tinyldm.{stranger}") for stranger in strangers), (path, name)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help_answers_without_torch(script):
    code = ("import runpy, sys\nsys.argv = [sys.argv[1], '--help']\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code and 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
