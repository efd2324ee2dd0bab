"""Finds the newest model in the folder of a run."""

from __future__ import annotations

from pathlib import Path

from tinyldm.files import read_json
from tinyldm.folders import hub
from tinyldm.folders.load import FILES
from tinyldm.training import checkpoint


def find_model(path: str | None, runs: Path = Path("runs")) -> Path | str:
    """Where the model is that `path` names. A model folder, a checkpoint file and a hub id are returned as they are; for a run
    folder it is the model of its newest checkpoint; for None, that of the run under `runs` that finished last. ValueError, with
    advice, where there is none."""
    if path is None:
        finished = [last for run in runs.glob("*") for last in checkpoint.names(run)[-1:]
                    if checkpoint.read_state(last).get("finished")]
        if not finished:
            raise ValueError(f"no finished run under {runs}/: train one with 'python train.py --preset tiny', "
                             "or name a run or model folder with --model")
        return max(finished, key=lambda last: (last / "state.json").stat().st_mtime) / "model"
    folder = Path(path)
    if hub.is_hub_id(path):
        return path
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: name a run, a model folder, a checkpoint file or a hub id such as "
                         "stable-diffusion-v1-5/stable-diffusion-v1-5")
    if (folder / "model_index.json").exists() or folder.suffix in FILES:
        return folder
    if (folder / "model" / "model_index.json").exists():
        return folder / "model"
    trained = [last for last in checkpoint.names(folder) if (last / "model").is_dir()]
    if not trained and (folder / "config.json").exists():
        config = read_json(folder / "config.json", "name a run or a model folder")
        raise ValueError(f"{folder} has no checkpoint of its network yet: continue training with --resume auto" if "preset" in config
                         else f"{folder} is one part of a model: name the folder around it")
    if not trained:
        raise ValueError(f"{folder} is neither a run, a model folder nor a checkpoint file ({', '.join(FILES)})")
    return trained[-1] / "model"
