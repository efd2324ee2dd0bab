"""Averaged weights of any width, after training: post-hoc EMA (arXiv:2312.02696, Sec. 3.2).

    python -m tinyldm.reconstruct runs/mine --width 0.08 --out my-model/                 between --ema-widths 0.05 0.1, say
    python -m tinyldm.reconstruct runs/mine --width 0.08 --step 20000 --out my-model/    as it was then

For runs with --ema-widths: each checkpoint that is kept holds the averages of those widths, and a sum of them all comes
near any other. More checkpoints (--keep-every) come nearer, at and before the step of the last one. The folder holds what
the newest checkpoint's does, with other weights. Then: python sample.py "a red fox" --model my-model/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tinyldm.cli import Parser, fail, guard

FAR = 0.1                                                      # of a reconstruction's weighting: worth a remark
WIDEST = 12 ** -0.5                                            # the width of the plain mean of all steps


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tinyldm.reconstruct")
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, of a training with --ema-widths")
    add("--width", type=float, required=True, metavar="SIGMA",
        help="standard deviation of the steps' weights in the average over the number of steps: 0.05 or 0.1, say")
    add("--step", type=int, metavar="N", help="as the average was after so many steps (default: the last checkpoint's)")
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
        fail(f"{args.run} has kept one average of a fixed decay, of which no other can be made: train with --ema-widths 0.05 0.1")
    if not 0 < args.width < WIDEST:
        fail(f"--width {args.width:g} must lie between 0 and 0.288, which is the plain mean of all steps")
    if args.step is not None and args.step < 1:
        fail(f"--step {args.step}: averages begin at step 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is there already and not empty: name another folder")
    return args


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    ARGS = parse()

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tinyldm.files import replace_folder
from tinyldm.folders.load import load_model
from tinyldm.folders.rename import published_names
from tinyldm.folders.save import save_model, weights_name, written_rules
from tinyldm.model import Model, architecture
from tinyldm.training import checkpoint
from tinyldm.training.ema import coefficients, overlap, reconstruct, to_gamma


class Stored(Mapping[str, Tensor]):
    """Tensors in files: name -> (file, its name there). Each is read when it is asked for."""

    def __init__(self, places: dict[str, tuple[Path, str]]):
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        file, inside = self.places[name]
        try:
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(inside)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} does not hold {inside} ({error}): is config.json of another run?") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def whole_checkpoints(run: Path) -> dict[int, Path]:
    """Step -> checkpoint, in order. ValueError where there is none."""
    found = {}
    for folder in checkpoint.names(run):
        if fault := checkpoint.find_damage(folder):
            print(f"checkpoint {folder.name} is damaged ({fault}): left out")
        elif (state := checkpoint.read_state(folder))["stage"] == "step":
            found[state["step"]] = folder
    if not found:
        raise ValueError(f"{run} has no whole checkpoint of its network: train on with --resume auto")
    return found


def trained_parts(model: Model, config: dict) -> list[str]:
    return ["net"] if config.get("text_weights") else ["net", *model.text.modules]


def part_folder(part: str, module: nn.Module) -> str:
    """Where a part of a model is in its folder: text_2 -> text_encoder_2."""
    return part.replace("text", "text_encoder") if part.startswith("text") else architecture(module).folder


def stored(folder: Path, model: Model, config: dict) -> list[tuple[float, Stored]]:
    """The averages in a checkpoint, with their widths: "part.name" -> tensor."""
    first, *others = map(float, config["ema_widths"])
    own, places = [], {}
    for part in trained_parts(model, config):
        module = model.modules[part]
        file = folder / "model" / part_folder(part, module) / weights_name(architecture(module), None)
        for name, published in published_names(module.state_dict(), written_rules(module)).items():
            own.append(f"{part}.{name}")
            places[own[-1]] = file, published
    beside = folder / "averages.safetensors"
    return [(first, Stored(places)), *((width, Stored({name: (beside, f"{width}/{name}") for name in own})) for width in others)]


def misfit(snapshots: list[tuple[int, float]], sigma_rel: float, step: int) -> float:
    """How far the best sum of the weightings of [(step, sigma_rel)] is from the wanted one, relative to its length (the
    root of the integral of the square): 0 to about 1."""
    shares = np.append(coefficients(snapshots, sigma_rel, step), -1.0)
    places = [(at, to_gamma(width)) for at, width in [*snapshots, (step, sigma_rel)]]
    steps, gammas = (np.array(values, dtype=np.float64) for values in zip(*places))
    products = overlap(steps[:, None], gammas[:, None], steps, gammas)
    return float(max(shares @ products @ shares, 0.0) / products[-1, -1]) ** 0.5


def main() -> None:
    args, run = ARGS, Path(ARGS.run)
    found = whole_checkpoints(run)
    last, newest = list(found.items())[-1]
    step = args.step or last
    if step > last:
        raise ValueError(f"--step {step:,} lies after the last whole checkpoint of {run}, at step {last:,}: leave it out for that one")
    model = load_model(newest / "model")
    snapshots = [(at, width, tensors) for at, folder in found.items() for width, tensors in stored(folder, model, args.config)]
    off = misfit([(at, width) for at, width, _ in snapshots], args.width, step)
    averages = reconstruct(snapshots, args.width, step)
    own = lambda part: {name.removeprefix(f"{part}."): x for name, x in averages.items() if name.startswith(f"{part}.")}
    parts = {part: (model.modules[part], own(part)) for part in trained_parts(model, args.config)}
    source = newest / "model"
    texts = {part: source / part_folder(part, module) for part, module in model.text.modules.items()}
    replace_folder(Path(args.out).resolve(), lambda partial: save_model(
        partial, net=parts["net"], vae=source / "vae", texts=[parts.get(part, written) for part, written in texts.items()],
        tokenizers=[source / written.name.replace("text_encoder", "tokenizer") for written in texts.values()],
        scheduler=model.scheduler, defaults=model.defaults | {"step": step, "ema_width": args.width}))
    widths = ", ".join(f"{float(width):g}" for width in args.config["ema_widths"])
    print(f"width {args.width:g} at step {step:,}, from the averages of width {widths} at step {', '.join(f'{at:,}' for at in found)}: "
          f"{off:.1%} off its weighting of the steps" + ", which more checkpoints (--keep-every) would lower" * (off > FAR))
    print(f"{args.out}: python sample.py \"a red fox\" --model {args.out}")


if __name__ == "__main__":
    guard(main)
