"""Run folders, made up, and what a report says of them."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tinyldm.config import flatten, preset_config

STEPS = dict(vae_steps=950, max_steps=850)      # of the two stages, whatever the preset has


def make_run(folder: Path, rows: list = (), config: dict | None = None, checkpoints: dict = {}, samples: tuple = ()) -> Path:
    for name in ("samples", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config if config is not None else flatten(preset_config("tiny", **STEPS))))
    for name, state in checkpoints.items():
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    for i, name in enumerate(samples):
        Image.new("RGB", (40, 20), (40 * i, 90, 120)).save(folder / "samples" / name)
    return folder


def data_of(page: Path) -> dict:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert len(found) == 1
    return json.loads(found[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def losses(n: int, **more) -> list[dict]:
    return [{"stage": "step", "step": i, "loss": 1 / i, **more} for i in range(1, n + 1)]


def full_row(stage: str, i: int) -> dict:
    noise = 0.100001 + (i * 7919 % 9973) / 10007
    names = "loss lr_factor seconds images_per_second grad_norm update_ratio val_raw val_ema mfu memory_gb"
    return {"stage": stage, "step": i, "skipped": i, **dict.fromkeys(names.split(), noise),
            "t_bins": [noise] * 8, "val_bins": [noise] * 8}
