"""The examples run, and the documents describe the code as it is: quoted lines, tables, flags, files and links."""

import ast
import math
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, script
from PIL import Image
from small_models import unet_model

from tinyldm.data import toyworld
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_loaded
from tinyldm.models.vae import Posterior
from tinyldm.objectives.reconstruction import TERMS
from tinyldm.random_streams import Stream

README, DOCS = ROOT / "README.md", ROOT / "docs"
WRITTEN_HERE = [README, *(DOCS / f"{name}.md" for name in ("architecture", "training", "glossary", "autoencoder"))]
SUBJECTS, SIDE, GAP = {"fox": "grass", "star": "sand", "boat": "sea", "house": "snow"}, 128, 2 * 4


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def table(path: Path, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with this cell, without the header."""
    rows = text(path).split(f"\n| {first} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# ---------------------------------------------------------------- examples/minimal.py


def minimal(folder: Path, *words: object) -> str:
    """Run the example -> what it printed. Its picture is folder/drawn.png."""
    done = script("examples/minimal.py", "--out", folder / "drawn.png", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_minimal_example_writes_a_row_per_subject_and_a_column_per_colour(tmp_path):
    printed = minimal(tmp_path, "--steps", 2)
    assert re.search(r"step +2: loss \d", printed)
    height, width = ((SIDE + GAP) * count - GAP for count in (len(SUBJECTS), len(toyworld.COLOURS)))
    assert np.asarray(Image.open(tmp_path / "drawn.png")).shape == (height, width, 3)


def test_every_row_of_the_minimal_example_has_a_pair_that_training_never_shows():
    assert f"SHOWN = {SUBJECTS}".replace("'", '"') in text(ROOT / "examples" / "minimal.py")
    for pair in (("purple", "fox"), ("blue", "star"), ("red", "boat"), ("orange", "house")):
        assert pair in toyworld.HELD_OUT and pair not in toyworld.PAIRS["train"]
    assert len([pair for pair in toyworld.HELD_OUT if pair[1] in SUBJECTS]) == 4


@pytest.mark.slow
def test_two_hundred_steps_are_enough_to_see_what_was_learned(tmp_path):
    """Of the 32 pairs of subject and colour, each picture is nearest to its own."""
    minimal(tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "drawn.png"))[::4, ::4].astype(float)
    step = (SIDE + GAP) // 4
    drawn = [sheet[y * step:y * step + 32, x * step:x * step + 32] for y in range(len(SUBJECTS)) for x in range(len(toyworld.COLOURS))]
    wanted = [np.mean([toyworld.draw(toyworld.Scene(subject, colour, background, "large", seed=i), 32) for i in range(20)], axis=0)
              for subject, background in SUBJECTS.items() for colour in toyworld.COLOURS]
    nearest = [int(np.argmin([np.square(picture - other).mean() for other in wanted])) for picture in drawn]
    assert sum(i == found for i, found in enumerate(nearest)) >= 29


# ---------------------------------------------------------------- examples/vae_prior.py


def test_the_prior_of_an_autoencoder_is_standard_noise_in_its_encoder_s_own_latents(tmp_path):
    """Whatever mean and scale of latents is measured for diffusion."""
    model = unet_model()
    model.vae.config = replace(model.vae.config, scaling_factor=0.2)
    save_loaded(tmp_path / "model", model)
    done = script("examples/vae_prior.py", "--vae", tmp_path / "model", "--size", 8, "--count", 3, "--out", tmp_path / "prior.png")
    assert done.returncode == 0, done.stderr
    z = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    with torch.no_grad():
        wanted = load_model(tmp_path / "model").vae.decode(z).clamp(-1, 1).add(1).mul(127.5).round().movedim(1, 3).numpy()
    sheet = np.asarray(Image.open(tmp_path / "prior.png")).astype(float)
    assert sheet.shape == (8, 3 * 8 + 2 * 2, 3) and wanted.std() > 10
    for i in range(3):
        assert np.abs(sheet[:, 10 * i:10 * i + 8] - wanted[i]).max() <= 1


def test_the_loss_of_the_first_row_of_the_timeline_is_the_elbo_of_a_decoder_of_variance_one_half():
    """-log N(x; decoded, 1/2) + KL, divided by the number of values, up to the logarithm of pi (arXiv:1312.6114, Eq. 7)."""
    line = re.search(r"--vae-loss (.*?) --vae-latents noise=0 --out runs/elbo", text(DOCS / "timeline.md"))[1]
    assert {name: float(value) for name, value in (word.split("=") for word in line.split())} == {"mse": 1, "l1": 0, "kl": 1}
    posterior = Posterior(torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2))
    pixels, decoded = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    likelihood = torch.distributions.Normal(decoded, 0.5**0.5).log_prob(pixels).flatten(1).sum(1)
    q, p = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    elbo = likelihood - torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    number = pixels[0].numel()
    loss = TERMS["mse"].function(decoded, pixels) + TERMS["kl"].function(SimpleNamespace(posterior=posterior)) / number
    assert TERMS["kl"].summed
    torch.testing.assert_close(loss, -elbo / number - math.log(math.pi) / 2, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what the documents quote


def code(line: str) -> str:
    """A line of Python without its indentation and comment."""
    return re.sub(r"\s+#.*", "", line.strip())


def test_the_code_in_the_training_document_stands_in_train_py():
    blocks = re.findall(r"```python\n(.*?)```", text(DOCS / "training.md"), re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        lines = iter(map(code, text(ROOT / "train.py").splitlines()))       # read on, so the order of a block counts too
        for line in filter(None, map(code, block.splitlines())):
            assert line in lines, f"docs/training.md quotes a line that train.py does not have, or not in this order: {line}"


def test_the_table_of_random_streams_is_that_of_the_code():
    rows = {name.strip("`"): int(number) for name, number, *_ in table(DOCS / "training.md", "stream")}
    assert rows == {stream.name: stream.value for stream in Stream}


NO_LAYOUTS = ("families", "latent_rgb", "layout", "lpips", "pipelines", "scheduler", "scheduler_classes",
              "scheduler_process", "two_streams")                              # in vendor_loaders/


SMALL_TABLES = {"ACTIVATIONS", "ACTIVATION_NAMES", "DTYPES", "DTYPE_NAMES", "DEVICES", "HOW", "EXTRA_SHAPES", "TIME_SHIFT_TYPES",
                "TRAINED", "SETTINGS", "RESUME"}                                                     # nobody adds a row to these


def test_the_tables_of_the_architecture_are_where_it_says():
    rows = table(DOCS / "architecture.md", "table")
    assert len(rows) > 15
    for name, place, *_ in rows:
        name, found = name.strip("`"), re.search(r"`([^`]+)`", place)[1]
        files = (ROOT / "tinyldm" / found).glob("[a-z]*.py") if found.endswith("/") else [ROOT / "tinyldm" / found]
        files = [file for file in files if found[-1] != "/" or file.stem not in NO_LAYOUTS]
        for file in files:
            assert re.search(rf"^{name}\b.* = ", text(file), re.MULTILINE), (name, file)
    sources = "".join(text(file) for file in ROOT.glob("tinyldm/**/*.py"))
    assert set(re.findall(r"\blookup\(([A-Z_]+),", sources)) - SMALL_TABLES <= {name.strip("`") for name, *_ in rows}


# ---------------------------------------------------------------- what imports what


def imported(file: Path) -> set[str]:
    """Names in tinyldm/, packages or modules, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(text(file))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinyldm":
            _, _, rest = node.module.partition(".")
            names |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
    return names


def test_each_line_of_the_architecture_imports_only_from_lines_above_it():
    above: set[str] = set()
    for names, _, matter in table(DOCS / "architecture.md", "in `tinyldm/`"):
        names, matter = (re.findall(r"`(\w+)`", cell) for cell in (names, matter))
        found = set()
        for name in names:
            folder = ROOT / "tinyldm" / name
            files = folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
            found |= {other for file in files for other in imported(file)} - {name}
        assert found <= above and set(matter) <= found, names
        above |= set(names)
    packages = {path.stem for path in (ROOT / "tinyldm").iterdir() if path.stem not in ("__init__", "__main__", "__pycache__")}
    assert above == packages


# ---------------------------------------------------------------- files, links, flags


@pytest.mark.parametrize("path", WRITTEN_HERE, ids=lambda path: path.stem)
def test_links_and_files_are_there_and_lines_fit_the_page(path):
    content = text(path)
    assert not [line for line in content.splitlines() if len(line) > 135]
    for link in re.findall(r"\]\(([^)\s]+)\)", content):
        file, _, section = link.partition("#")
        target = path.parent / file if file else path
        assert link.startswith("http") or target.exists(), link
        if section:
            titles = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                      for line in text(target).splitlines() if line.startswith("#")]
            assert section in titles, link
    for name in re.findall(r"`((?:tinyldm|docs|examples|benchmarks|tests)/[\w/.]*)`", content):
        assert (ROOT / name).exists(), name
    if path.stem in ("architecture", "training", "glossary"):               # where a file may be named without tinyldm/
        for name in re.findall(r"`([a-z_]+(?:/\w+)*\.py)`", content):
            places = [ROOT / name, ROOT / "tinyldm" / name, *ROOT.glob(f"tinyldm/*/{name}")]
            assert any(place.exists() for place in places), name


@lru_cache
def known_flags(words: tuple[str, ...]) -> set[str]:
    done = script(*words, "--help")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<!\S)(--?[a-z][\w-]*)", re.sub(r"[,\[\]|]", " ", done.stdout)))


SCRIPTS = {"train.py": ("train.py",), "sample.py": ("sample.py",), "prepare.py": ("prepare.py",), "evaluate.py": ("evaluate.py",),
           "tinyldm.export": ("-m", "tinyldm.export"), "tinyldm.reconstruct": ("-m", "tinyldm.reconstruct"),
           "minimal.py": ("examples/minimal.py",), "gpu.py": ("benchmarks/gpu.py",)}


def commands(content: str) -> list[tuple[str, list[str]]]:
    """(script, its flags) of every command in a document's code."""
    spans = [part.replace("\\\n", " ") for kind, part in re.findall(r"```(\w*)\n(.*?)```", content, re.DOTALL)
             if kind in ("", "sh")] + re.findall(r"`([^`\n]+)`", content)
    found = []
    for line in (line.partition(" # ")[0] for span in spans for line in span.splitlines()):
        for name in SCRIPTS:
            if re.search(rf"(^|[\s/]){re.escape(name)}\s", line):
                rest = re.split(rf"{re.escape(name)}\s", line, maxsplit=1)[1]
                found.append((name, re.findall(r"(?<!\S)(--?[a-z][\w-]*)", re.sub(r'"[^"]*"', "", rest))))
    return found


def test_every_command_in_the_documents_has_flags_that_its_script_knows():
    found = [command for path in WRITTEN_HERE for command in commands(text(path))]
    assert len(found) > 25 and {name for name, _ in found} >= SCRIPTS.keys() - {"minimal.py"}
    for name, flags in found:
        assert set(flags) <= known_flags(SCRIPTS[name]), (name, flags)


def test_every_flag_that_the_documents_name_belongs_to_a_script():
    known = set.union(*(known_flags(words) for words in SCRIPTS.values())) | {"--nproc-per-node", "--max-restarts", "--shutdown-timeout", "--help"}
    for path in WRITTEN_HERE:
        named = {flag for span in re.findall(r"`([^`\n]+)`", text(path)) for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", span)}
        assert named <= known, (path.name, named - known)
