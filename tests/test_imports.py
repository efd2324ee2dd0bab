"""The house's rules: what may import what, and that an import runs nothing."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, ROOT

SOURCES = sorted([*(path for path in ROOT.glob("*.py") if path.name != "setup.py"), *ROOT.glob("tinyldm/**/*.py")])
Graph = Mapping[str, Iterable[str]]


def module_name(path: Path) -> str:
    """tinyldm/config/__init__.py -> tinyldm.config"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}                         # the scripts among them


def imports(source: str, known: Iterable[str] = ()) -> set[str]:
    """The modules that a source imports, inside functions too. `from a import b` is a.b where that is known as a module, else a.

    import_module("a." + something) counts as an import of all modules of a that a string of the file names."""
    tree, names, known = ast.parse(source), set(), set(known)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & known or {node.module}
            names |= {node.module} if inner - known else set()
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__"):
            package = ast.unparse(node.args[0]).lstrip("f").strip("'\"").partition("{")[0]
            names |= {name for name in known if name.startswith(package) and (name == package or name.removeprefix(package) in texts)}
    return names


def package(module: str) -> str:
    """tinyldm.data.cache -> tinyldm.data; a single module such as tinyldm.files is its own."""
    return ".".join(module.split(".")[:2])


def circle(graph: Graph) -> list[str]:
    """The modules of one circle, [] where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


FILES = {name: imports(path.read_text(encoding="utf-8"), MODULES) & MODULES.keys() - {name} for name, path in MODULES.items()}
PACKAGES: dict[str, set[str]] = {}
for name, others in FILES.items():
    PACKAGES.setdefault(package(name), set()).update(package(other) for other in others if package(other) != package(name))


# What Python 3.11 and 3.12 brought, by module: setup.cfg promises 3.10, and the tests may run on a later one.
NEWER = {"typing": "Self Never LiteralString Required NotRequired Unpack TypeVarTuple assert_never assert_type reveal_type override",
         "enum": "StrEnum ReprEnum", "datetime": "UTC", "contextlib": "chdir", "itertools": "batched", "hashlib": "file_digest",
         "tomllib": "load loads"}


@pytest.mark.parametrize("folder", ["tinyldm", "tests", "benchmarks", "examples", "docs", "."])
def test_sources_are_those_of_the_lowest_python_that_is_promised(folder):
    for path in ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))):
            if isinstance(node, ast.ImportFrom):
                newer = {alias.name for alias in node.names} & set(NEWER.get(node.module or "", "").split())
                assert not newer, f"{path}: {newer}"
            assert not (isinstance(node, ast.Import) and any(alias.name == "tomllib" for alias in node.names)), path
            bare = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and node.slice.elts and (
                node.slice.elts[0].col_offset == node.slice.col_offset)        # a tuple without brackets of its own
            assert not (bare and any(isinstance(each, ast.Starred) for each in node.slice.elts)), f"{path}:{node.lineno}: a[b, *c] is a mistake of syntax in Python 3.10: write a[(b, *c)]"


def test_nothing_outside_tests_and_benchmarks_imports_diffusers_or_transformers_or_pickle():
    assert len(SOURCES) > 100
    for path in SOURCES:
        roots = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
        assert not roots & {"diffusers", "transformers", "open_clip", "pickle", "torchvision"}, path


def test_no_two_files_and_no_two_packages_import_each_other_by_any_way():
    assert len(FILES) > 90 and {"tinyldm.models", "tinyldm.config", "tinyldm.model", "tinyldm.pipeline"} <= PACKAGES.keys()
    assert not circle(FILES)
    assert not circle(PACKAGES)


def test_a_circle_is_seen_through_functions_and_names_that_are_put_together():
    known = {"a.one", "a.two", "a.three", "a"}
    assert imports("from a import one, thing\ndef f():\n    import a.two", known) == {"a", "a.one", "a.two"}
    assert imports("from a.one import thing", known) == {"a.one"}
    assert imports("ROW = 'three'\ndef f(x):\n    import_module(f'a.{x}')", known) == {"a.three"}
    assert imports("import importlib\nimportlib.import_module('a.two')", known) == {"importlib", "a.two"}
    assert set(circle({"a.one": {"a.two"}, "a.two": {"a.three"}, "a.three": {"a.one"}})) == {"a.one", "a.two", "a.three"}
    assert circle({"a.one": {"a.two", "a.three"}, "a.two": {"a.three"}}) == []


@pytest.mark.parametrize("room, allowed", [
    ("models", {"tinyldm.lookup"}), ("diffusion", {"tinyldm.lookup"}), ("lookup", set()), ("files", set()), ("durations", set()),
    ("unicode", set()), ("other_names", set()), ("text", {"tinyldm.device", "tinyldm.files", "tinyldm.lookup", "tinyldm.models", "tinyldm.unicode"}),
    ("config", {"tinyldm.lookup", "tinyldm.cli", "tinyldm.durations", "tinyldm.unicode"}),
    ("cli", {"tinyldm.lookup", "tinyldm.other_names", "tinyldm.unicode", "tinyldm.version"}), ("pictures", {"tinyldm.files", "tinyldm.unicode"}),
])
def test_the_lowest_rooms_import_almost_nothing(room, allowed):
    assert PACKAGES[f"tinyldm.{room}"] <= allowed


@pytest.mark.parametrize("room", ["models", "diffusion"])
def test_networks_and_mathematics_touch_no_files(room):
    for name in (name for name in FILES if package(name) == f"tinyldm.{room}"):
        roots = {other.split(".")[0] for other in imports(MODULES[name].read_text(encoding="utf-8"))}
        assert not roots & {"os", "io", "pathlib", "shutil", "tempfile", "json", "safetensors", "huggingface_hub", "PIL"}, name


def test_networks_share_what_they_have_in_common_in_two_files():
    """But TAESD, which takes the place of another network, the autoencoder, and is one; and CLIP, which is made of two."""
    networks = {name for name in FILES if package(name) == "tinyldm.models"} - {"tinyldm.models"}
    shared = {name: imports(MODULES[name].read_text(encoding="utf-8"), networks) & networks for name in networks}
    assert shared.pop("tinyldm.models.taesd") == {"tinyldm.models.vae"}
    assert shared.pop("tinyldm.models.clip") == {"tinyldm.models.vit", "tinyldm.models.clip_text"}
    assert set().union(*shared.values()) <= {"tinyldm.models.layers", "tinyldm.models.convolutions"}


@pytest.mark.parametrize("room, strangers", [
    ("vendor_loaders", ("folders", "data", "objectives", "planning", "training", "evaluation", "pipeline", "config")),
    ("model", ("folders", "data", "objectives", "planning", "training", "evaluation", "pipeline", "config")),
    ("folders", ("data", "objectives", "planning", "training", "evaluation", "pipeline", "config")),
    ("data", ("objectives", "planning", "training", "evaluation", "pipeline")),
    ("objectives", ("data", "planning", "training", "evaluation", "pipeline")),
    ("planning", ("training", "evaluation")),
    ("pipeline", ("data", "objectives", "planning", "training", "evaluation", "config")),
])
def test_imports_point_one_way(room, strangers):
    assert not PACKAGES[f"tinyldm.{room}"] & {f"tinyldm.{stranger}" for stranger in strangers}


# Imports what it is given, one after the other, and says what they did beside defining things.
WATCH = """
import importlib, json, os, random, sys, threading, warnings
import huggingface_hub, numpy, PIL.Image, safetensors.torch, scipy.linalg, tokenizers, torch, tqdm
import torch.distributed.fsdp, torch.utils.checkpoint, torch.utils.flop_counter

written, current = [], ""
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chdir", "os.putenv",
           "shutil.rmtree", "subprocess.Popen", "os.system", "os.fork", "socket.connect", "signal.pthread_kill"}

def watch(event, args):
    if event in CHANGES or event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append([current, event, str(args[0])])

def state():
    return {"torch": torch.get_rng_state().tolist(), "numpy": str(numpy.random.get_state()), "random": str(random.getstate()),
            "threads": [threading.active_count(), torch.get_num_threads()], "dtype": str(torch.get_default_dtype()),
            "grad": torch.is_grad_enabled(), "streams": [id(sys.stdout), id(sys.stderr)], "folder": os.getcwd(),
            "environment": dict(os.environ), "flash": torch.backends.cuda.flash_sdp_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(), "backends": str(torch.backends.cuda.matmul.allow_tf32)}

before, changed = state(), []
sys.addaudithook(watch)
for current in sys.argv[1:]:
    importlib.import_module(current)
    after = state()
    changed += [[current, name] for name in after if after[name] != before[name]]
    before = after
os.write(3, json.dumps({"written": written, "changed": changed}).encode())
"""


def test_importing_a_module_runs_nothing(tmp_path):
    assert {"train", "sample", "evaluate", "prepare", "tinyldm.export"} <= MODULES.keys()
    (tmp_path / "here").mkdir()
    (tmp_path / "guilty.py").write_text("import torch\ntorch.manual_seed(1)\nopen('made', 'w').close()")      # the one that is found
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "HOME": str(tmp_path / "here"), "TMPDIR": str(tmp_path / "here")}
    with open(tmp_path / "report.json", "wb") as report:
        command = [sys.executable, "-B", "-c", f"import os\nos.dup2({report.fileno()}, 3)\n{WATCH}", *MODULES, "guilty"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "here", pass_fds=[report.fileno()],
                              env=ENVIRONMENT | environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == {"written": [["guilty", "open", "made"]], "changed": [["guilty", "torch"]]}
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["made"]


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help_answers_without_torch(script):
    code = ("import runpy, sys\nsys.argv = [sys.argv[1], '--help']\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code and 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("path", sorted([*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("examples/*.py")]),
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_benchmarks_docs_and_examples_take_from_the_library_is_there(path):
    """Nobody runs them for weeks, in which names move."""
    names = {(node.module, alias.name) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
             for alias in node.names if (node.module or "").split(".")[0] == "tinyldm"}
    for module, name in names:
        assert f"{module}.{name}" in MODULES or hasattr(importlib.import_module(module), name), (module, name)
