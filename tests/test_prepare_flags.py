"""Every flag of prepare.py reaches what it is for, and nothing else: two caches whose command lines differ in a flag differ in the
aspects that its row names, and in no other."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import load_script, randomise, thinned
from outcomes import Row, several_shapes
from PIL import Image
from test_sample import make

from tinyldm.config import parse
from tinyldm.data import encoding
from tinyldm.data.cache import Cache
from tinyldm.folders.save import save_model, save_part
from tinyldm.models.vae import AutoencoderKL, VAEConfig

CACHED = {"latents", "captions", "batches"}         # other pictures, or other captions of them
DIT = ["--network", "dit", "--buckets", "3", "--resolution", "16"]
ROWS = {
    "preset": Row(["--preset", "tiny_dit"], {"unit", "latents"}, ["--buckets", "3"]),
    "seed": Row(["--seed", "3"], {"latents", "captions"}, ["--data", "toyworld", "--scenes", "6"]),
    "dtype": Row(["--dtype", "bf16"], {"latents", "dtype"}),
    "compile": Row(["--compile"], {"compiled"}, which_way=lambda a, b: (a.compiled, b.compiled) == ([], ["encode"])),
    "data": Row(["--data", "other"], {"latents"}),
    "scenes": Row(["--scenes", "7"], CACHED, ["--data", "toyworld", "--scenes", "6"], lambda a, b: len(b.latents) == 7),
    "caption_key": Row(["--caption-key", "short"], {"captions"}),
    "resolution": Row(["--resolution", "16"], {"latents"}),
    "buckets": Row(["--buckets", "3"], {"latents", "captions", "unit", "batches"}),
    "flip": Row(["--flip"], {"shape", "batches"}, which_way=lambda a, b: b.shape[0] == 2 and b.batches == 2 * a.batches),
    "moments": Row(["--moments"], {"latents", "shape"}, which_way=lambda a, b: b.shape[1] == 2 == 2 * a.shape[1]),
    "keep_pictures": Row(["--keep-pictures", "2"], {"kept"}, which_way=lambda a, b: (a.kept, b.kept) == (0, 2)),
    "stages": Row(["--stages", "8=0.5", "16=0.5"], {"folders", *CACHED}, which_way=lambda a, b: len(b.folders) == 2),
    "min_side": Row(["--min-side", "12"], CACHED),
    "max_aspect": Row(["--max-aspect", "1.5"], CACHED),
    "min_caption": Row(["--min-caption", "2"], CACHED),
    "max_caption": Row(["--max-caption", "99"], CACHED),
    "max_skip": Row(["--max-skip", "0.01"], {"error"}),
    "encode_batch_size": Row(["--encode-batch-size", "2"], {"batches"}),
    "vae_weights": Row(["--vae-weights", "vae_2"], {"latents", "vae"}),
    "text_weights": Row(["--text-weights", "model"], {"tokens"}),
    "network": Row(["--network", "dit"], {"unit", "latents"}, ["--buckets", "3", "--resolution", "16", "--dit", "patch=4"]),
    "unet": Row(["--unet", "widths=8,8,8", "attention=False,False,False", "heads=1,1,1"], {"unit", *CACHED},
                ["--buckets", "3"]),
    "dit": Row(["--dit", "patch=4"], {"unit", "latents"}, DIT),
    "net": Row(["--net", "patch=4"], {"unit", "latents"}, DIT),
    "--out": Row(["--out", "elsewhere"], {"folders"}, which_way=lambda a, b: b.folders == ["elsewhere"]),
    "--rebuild": Row(["--rebuild"], {"error"}, ["--resolution", "16"]),
    "--preview": Row(["--preview", "sheet.png"], {"pictures"}),
    "--decode-check": Row(["--decode-check", "2"], {"pictures"}, which_way=lambda a, b: b.pictures == [(2 * 8 + 2, 2 * 8 + 2)]),
}
DEFAULTS = {"--data": "mine", "--resolution": "8", "--vae-weights": "vae_1", "--max-skip": "0.2", "--dtype": "fp32", "--out": "cache"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders of pictures, two autoencoders, and a model."""
    folder, model = tmp_path_factory.mktemp("prepare"), make()
    several_shapes(folder / "mine", 0), several_shapes(folder / "other", 90)
    for seed in (1, 2):
        vae = AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4, middle_attention=False))
        save_part(folder / f"vae_{seed}", randomise(vae, seed))
    save_model(folder / "model", net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults={})
    return folder


def prepared(place: Path) -> dict[str, Any]:
    """What prepare.py has left."""
    folders = sorted(file.parent for file in place.glob("*/**/index.json"))
    caches, settings = [*map(Cache, folders)], json.loads((folders[0] / "settings.json").read_text())
    drawn = [file for file in place.rglob("*.png") if not file.stem.isdigit()]              # which the data's own are
    return dict(folders=[str(folder.relative_to(place)) for folder in folders], pictures=[Image.open(file).size for file in drawn],
                latents=[cache.latents([i]) for cache in caches for i in range(len(cache))],
                captions=[cache.captions(i) for cache in caches for i in range(len(cache))],
                tokens=len([*folders[0].rglob("tokens-*")]), shape=caches[0].shape, kept=caches[0].pictures,
                **{name: settings[name] for name in ("unit", "dtype", "vae")})


@pytest.mark.parametrize("name", thinned(2, ROWS))
def test_a_flag_of_prepare_changes_what_it_is_for_and_nothing_else(name, places, monkeypatch, tmp_path):
    module, row, batches, compiled, real = load_script("prepare"), ROWS[name], [], [], encoding.posterior
    monkeypatch.setattr(encoding, "posterior", lambda vae, images, *more: batches.append(len(images)) or real(vae, images, *more))
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__name__) or function)
    monkeypatch.setattr(module, "Signals", lambda: SimpleNamespace(received=0, check=lambda: None))
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def prepare(*words):
        words = [*words, *(word for flag, value in DEFAULTS.items() if flag not in words for word in (flag, value))]
        module.CONFIG, module.ARGS = parse(words, "", module.FLAGS, module.NAMES)
        module.main()

    def run(place, *words):
        place.mkdir()
        for source in places.iterdir():
            (place / source.name).symlink_to(source)
        monkeypatch.chdir(place)
        if name == "--rebuild":                                 # there is a cache, made with other settings
            prepare()
        batches.clear(), compiled.clear()
        try:
            prepare(*words)
        except ValueError as error:
            return {"error": str(error)}
        return prepared(place) | {"batches": [*batches], "compiled": [*compiled]}

    row.check(run(tmp_path / "without", *row.over), run(tmp_path / "with", *row.over, *row.value))


def test_every_flag_of_prepare_has_a_row_or_a_reason():
    module = load_script("prepare")
    assert {*module.NAMES, *module.FLAGS} == ROWS.keys() | {"device"}         # of which there may be one alone
