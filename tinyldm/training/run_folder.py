"""The folder of a run: its settings, and its newest model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tinyldm.adapters.embedding_files import STANDARD
from tinyldm.adapters.files import OWN as ADAPTER
from tinyldm.config import PATHS, Config, change, flatten
from tinyldm.data.file_sources import FILES as FILE_SOURCES
from tinyldm.data.sources import find_kind, parse_sources
from tinyldm.files import read_json, write_file
from tinyldm.folders import hub
from tinyldm.folders.load import FILES
from tinyldm.training import checkpoint
from tinyldm.training.distributed import launch
from tinyldm.training.report import refresh_report
from tinyldm.training.vae_pictures import forget_pictures
from tinyldm.version import version


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
        raise hub.missing(path)
    if (folder / "model_index.json").exists() or folder.is_file() and folder.suffix.lower() in FILES:
        return folder
    if (folder / "model" / "model_index.json").exists():
        return folder / "model"
    if find_clip(folder):
        raise ValueError(f"{folder} holds a CLIP, which draws nothing: it measures pictures, python evaluate.py PICTURES --metric clip "
                         f"--clip {path}")
    if beside := find_beside(folder):
        base = read_json(beside.parents[2] / "config.json", None).get("model") if (beside.parents[2] / "config.json").exists() else None
        what, flag = ("an adapter", "--lora") if beside.name == ADAPTER else ("the vectors of a token", "--embedding")
        raise ValueError(f"{folder} holds {what}, not a model: name the model that it was trained with, --model {base or 'MODEL'} {flag} "
                         f"{path}")
    trained = [last for last in checkpoint.names(folder) if (last / "model").is_dir()]
    if not trained and (folder / "config.json").exists():
        config = read_json(folder / "config.json", "name a run or a model folder")
        raise ValueError(f"{folder} has no checkpoint of its network yet: continue training with --resume yes" if "preset" in config
                         else f"{folder} is one part of a model: name the folder around it")
    if not trained:
        raise ValueError(f"{folder} is neither a run, a model folder nor a checkpoint file ({', '.join(FILES)})")
    return trained[-1] / "model"


def find_clip(path: str | Path) -> Path | None:
    """The CLIP of a run's newest checkpoint; None where a path ("": there is none) is no such run."""
    return next((last / "clip" for last in reversed(checkpoint.names(Path(path)) if path else []) if (last / "clip").is_dir()), None)


def find_beside(folder: Path) -> Path | None:
    """The file with the adapter or the embedding of a run's newest checkpoint, or of a checkpoint; None where it holds none."""
    for last in (*reversed(checkpoint.names(folder)), folder):
        for name in (ADAPTER, STANDARD):
            if (last / name).is_file():
                return last / name
    return None


def next_command(config: Config) -> str:
    """What to do with the result of a run, as the end of a sentence."""
    own, run = config.finetune, config.run.out
    if find_clip(run):
        return f"score pictures by their captions: python evaluate.py PICTURES --metric clip --clip {run}"
    if config.run.only:
        return f"give this autoencoder to another run: --vae-weights {Path(run) / 'vae'}"
    prompt = own.instance.split("|")[0] or (f"a photo of a {own.token}" if own.token else "a red fox")
    draw = f'draw what you like: python sample.py "{prompt}" --model '
    if own.whole or not own.kind:
        return draw + run
    drawing = config.drawing            # an adapter has no defaults of its own, and one of few steps needs others than its model's
    others = f" --sampler {drawing.sampler} --steps {drawing.steps} --cfg {drawing.cfg:g}" if config.objective.name != "denoising" else ""
    return f"{draw}{own.model} --{'lora' if own.adapts else 'embedding'} {run}{others}"


def find_learned(typed: str) -> str:
    """PATH, or PATH and more behind a colon, as --lora and --embedding take it -> the same, of a run folder with the path of its newest
    adapter or embedding."""
    heads = [typed[:colon.start()] for colon in re.finditer(":|$", typed)]
    folder = next((head for head in reversed(heads) if head and Path(head).is_dir()), None)
    file = folder and find_beside(Path(folder))
    return f"{file}{typed[len(folder):]}" if file else typed


def prepare_run(config: Config) -> None:
    """Make or reopen the run folder, lock it, and write the resolved config into it."""
    run, new = Path(config.run.out), config.run.resume == "no"
    if new and ((run / "vae").exists() or checkpoint.names(run)):
        raise ValueError(f"{run} holds a run already: continue it with --resume yes, or name another folder with --out")
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.lock(run)
    if new:                                                     # left by a run that ended before its first checkpoint
        (run / "running.json").unlink(missing_ok=True)
        forget_pictures(run)
        forget_drawn(config)
    file = write_settings(config)
    write_file(run / "launch", launch())
    refresh_report(run)
    print(f"{'new run' if new else 'continuing the run'} in {run}, configuration in {file}")
    if config.run.only and (run / "vae").is_dir():
        print(f"its VAE is finished: to train it further, begin another run with --vae-init {run / 'vae'}")


def forget_drawn(config: Config) -> None:
    """Delete the pairs and the pictures of the class that a run with other settings has drawn in this folder before it ended."""
    run = Path(config.run.out)
    if not (file := run / "config.json").exists():
        return
    before, now = read_json(file, None), json.loads(json.dumps(flatten(config) | {"resume": "no"}))
    if any(before.get(name) != value for name, value in now.items()):
        for drawn in (*run.glob("class/[0-9]*.png"), *run.glob("pairs-*/[0-9]*.safetensors")):
            drawn.unlink()


def write_settings(config: Config) -> Path:
    """Write the run's settings, the folder in which the run was begun, and the version that trains it, to its config.json -> that file.
    A resumed run keeps its paths, as they were typed there."""
    file = Path(config.run.out) / "config.json"
    before = read_json(file, None) if config.run.resume != "no" else {}
    begun = {"directory": os.getcwd(), "version": version()} | {name: before[name] for name in (*PATHS, "directory") if name in before}
    write_file(file, json.dumps(flatten(config) | {"resume": "no"} | begun, indent=1))
    return file


def find_paths(config: Config) -> Config:
    """The configuration of a resumed run with its relative paths found from the folder in which it was begun, wherever it is resumed.
    What is not there stays as it was typed: URLs and hub ids, and, where run and data have moved to another machine, paths, which
    are then relative to the current folder."""
    file = Path(config.run.out) / "config.json"
    directory = read_json(file, None).get("directory", "") if config.run.resume != "no" else ""
    if directory == os.getcwd() or not os.path.isdir(directory):
        return config
    there = lambda word: joined if word and os.path.exists(joined := os.path.join(directory, word)) else word
    weights = {"vae_weights": there(config.autoencoder.weights), "vae_init": there(config.autoencoder.init),
               "text_weights": there(config.text.weights), "model": there(config.finetune.model),
               "parts": [*map(there, config.finetune.parts)], "tokenizer": [*map(there, config.finetune.tokenizer)],
               "vae_lpips": [*map(there, config.autoencoder.lpips)]}
    if config.data.cache:                                       # then its sources are not read, and their names are those in the cache
        return change(config, **weights, cache=[there(folder) for folder in config.data.cache])
    return change(config, **weights, data=[find_source(word, directory) for word in config.data.sources])


def find_source(word: str, directory: str) -> str:
    """A word of --data that was typed in a directory, as an absolute path where it names a file, a folder or a pattern there."""
    if find_kind(parse_sources([word])[0].spec) is not FILE_SOURCES:
        return word
    joined, head = os.path.join(directory, word), re.split(r"[*?[{]", word, maxsplit=1)[0]
    found = parse_sources([joined])[0].spec if head == word else os.path.join(directory, os.path.dirname(head))
    return joined if os.path.exists(found) else word
