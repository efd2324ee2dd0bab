"""Reconstructs averaged weights of any width after training: post-hoc EMA (arXiv:2312.02696, Sec. 3.2).

    python -m tinyldm.reconstruct runs/mine --width 0.08 --out my-model/                 a run with --ema-widths 0.05 0.1, say
    python -m tinyldm.reconstruct runs/mine --width 0.08 --step 20000 --out my-model/    the average after 20000 steps

For runs with --ema-widths: each checkpoint that is kept holds the averages of those widths, and a weighted sum of all of them
approximates an average of any other width. More checkpoints (--keep-every) approximate it better, for steps up to that of the
last one. The folder is the newest checkpoint's model with other weights. Then: python sample.py "a red fox" --model my-model/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tinyldm.cli import Parser, begin, fail, guard

LARGE_MISFIT = 0.1                                             # a misfit above this is mentioned, with advice
MAX_WIDTH = 12 ** -0.5                                         # the width of the plain mean of all steps, 0.289


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tinyldm.reconstruct")
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, of a training with --ema-widths")
    add("--width", type=float, required=True, metavar="SIGMA",
        help="standard deviation of the steps' weights in the average over the number of steps: 0.05 or 0.1, say")
    add("--step", type=int, metavar="N", help="the average after this step (default: the last checkpoint's)")
    add("--out", required=True, metavar="FOLDER", help="where to write; must not exist yet, or be empty")
    args = parser.parse_args(argv)
    file, folder = Path(args.run) / "config.json", Path(args.out)
    try:
        args.config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        args.config = None
    if not isinstance(args.config, dict) or "preset" not in args.config:
        fail(f"{args.run} is no run folder: its config.json cannot be read")
    if not args.config.get("ema_widths"):
        fail(f"{args.run} has one average with a fixed decay, from which no other can be made: train with --ema-widths 0.05 0.1")
    if not 0 < args.width < MAX_WIDTH:
        fail(f"--width {args.width:g} must lie between 0 and 0.288, which is the plain mean of all steps")
    if args.step is not None and args.step < 1:
        fail(f"--step {args.step}: averages begin at step 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is there already and not empty: name another folder")
    return args


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    begin()
    ARGS = parse()

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tinyldm.files import replace_folder
from tinyldm.folders.load import load_model
from tinyldm.folders.rename import published_names, read_renamed
from tinyldm.folders.save import save_model, weights_name, written_rules
from tinyldm.model import Model, architecture
from tinyldm.training import checkpoint
from tinyldm.training.ema import coefficients, overlap, reconstruct, to_gamma


class Stored(Mapping[str, Tensor]):
    """A mapping of names to tensors in files. locations: name -> (file, name in that file, and where it is stored in another form,
    which, as in published_names). A tensor is read on each access."""

    def __init__(self, locations: dict[str, tuple[Path, str]]):
        self.locations = locations

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self.locations[name]
        try:
            with safe_open(file, "pt") as tensors:
                names = {checkpoint.current_name(name): name for name in tensors.keys()}
                return read_renamed(stored_name, lambda name: tensors.get_tensor(names.get(name, name)))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} does not hold {stored_name} ({error}): is config.json of another run?") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.locations)

    def __len__(self) -> int:
        return len(self.locations)


def undamaged_checkpoints(run: Path) -> dict[int, Path]:
    """Step -> checkpoint of the second stage, in order. ValueError where there is none."""
    found = {}
    for folder in checkpoint.names(run):
        if fault := checkpoint.find_damage(folder):
            print(f"checkpoint {folder.name} is damaged ({fault}): left out")
        elif (state := checkpoint.read_state(folder))["stage"] == "step":
            found[state["step"]] = folder
    if not found:
        raise ValueError(f"{run} has no undamaged checkpoint of its network: continue training with --resume yes")
    return found


def trained_parts(model: Model, config: dict) -> list[str]:
    return ["net"] if config.get("text_weights") else ["net", *model.text.modules]


def part_folder(part: str, module: nn.Module) -> str:
    """The folder of a part in a model folder: text_2 -> text_encoder_2."""
    return part.replace("text", "text_encoder") if part.startswith("text") else architecture(module).folder


def stored(folder: Path, model: Model, config: dict) -> list[tuple[float, Stored]]:
    """The averages in a checkpoint, as (width, {"part.name": tensor})."""
    first, *others = map(float, config["ema_widths"])
    names, locations = [], {}
    for part in trained_parts(model, config):
        module = model.modules[part]
        file = folder / "model" / part_folder(part, module) / weights_name(architecture(module), None)
        published = published_names(module.state_dict(), written_rules(module))
        for name, _ in module.named_parameters():              # buffers are not averaged
            names.append(f"{part}.{name}")
            locations[names[-1]] = file, published[name]
    file = folder / "averages.safetensors"
    return [(first, Stored(locations)), *((width, Stored({name: (file, f"{width}/{name}") for name in names})) for width in others)]


def misfit(snapshots: list[tuple[int, float]], sigma_rel: float, step: int) -> float:
    """The distance of the best sum of the snapshots' weightings of past steps from the wanted weighting, relative to the norm of
    the wanted one (the root of the integral of its square): 0 to about 1. snapshots: [(step, sigma_rel)]."""
    factors = np.append(coefficients(snapshots, sigma_rel, step), -1.0)
    weightings = [(at, to_gamma(width)) for at, width in [*snapshots, (step, sigma_rel)]]
    steps, gammas = (np.array(values, dtype=np.float64) for values in zip(*weightings))
    products = overlap(steps[:, None], gammas[:, None], steps, gammas)
    return float(max(factors @ products @ factors, 0.0) / products[-1, -1]) ** 0.5


def main() -> None:
    args, run = ARGS, Path(ARGS.run)
    found = undamaged_checkpoints(run)
    last, newest = list(found.items())[-1]
    step = args.step or last
    if step > last:
        raise ValueError(f"--step {step:,} is after the last undamaged checkpoint of {run}, at step {last:,}: leave it out to use "
                         "that one")
    model = load_model(newest / "model")
    snapshots = [(at, width, tensors) for at, folder in found.items() for width, tensors in stored(folder, model, args.config)]
    distance = misfit([(at, width) for at, width, _ in snapshots], args.width, step)
    averages = reconstruct(snapshots, args.width, step)
    own = lambda part: {name.removeprefix(f"{part}."): x for name, x in averages.items() if name.startswith(f"{part}.")}
    parts = {part: (module := model.modules[part], module.state_dict() | own(part)) for part in trained_parts(model, args.config)}
    source = newest / "model"
    texts = {part: source / part_folder(part, module) for part, module in model.text.modules.items()}
    replace_folder(Path(args.out).resolve(), lambda partial: save_model(
        partial, net=parts["net"], vae=source / "vae", texts=[parts.get(part, written) for part, written in texts.items()],
        tokenizers=[source / written.name.replace("text_encoder", "tokenizer") for written in texts.values()],
        scheduler=model.scheduler, defaults=model.defaults | {"step": step, "ema_width": args.width}))
    widths = ", ".join(f"{float(width):g}" for width in args.config["ema_widths"])
    print(f"width {args.width:g} at step {step:,}, from the averages of width {widths} at step {', '.join(f'{at:,}' for at in found)}: "
          f"{distance:.1%} off its weighting of the steps" + ", which more checkpoints (--keep-every) would lower"
          * (distance > LARGE_MISFIT))
    print(f"{args.out}: python sample.py \"a red fox\" --model {args.out}")


if __name__ == "__main__":
    guard(main)
