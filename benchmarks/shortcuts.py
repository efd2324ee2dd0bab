"""What each switch that makes drawing cheaper costs and changes, beside fewer steps: seconds, and the error against the plain picture.

    python benchmarks/shortcuts.py runs/tiny                    a trained model: its pictures of 32 captions
    python benchmarks/shortcuts.py runs/tiny --steps 50         from more steps
    python benchmarks/shortcuts.py --shape sd1.5 --dtype bf16   times alone: a network of Stable Diffusion 1.5's shape, with random weights

The error is the root mean square difference of pixels (0 to 255) to the picture that all steps in full draw from the same noise. Rows
run in turn, several rounds of all, and the median counts, so that another load of the machine does not fall on one row. Where a row of
fewer steps is as fast as one of a switch, the better one has the smaller error.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from tinyldm import pipeline
from tinyldm.cli import guard
from tinyldm.data import toyworld
from tinyldm.device import pick_device, pick_dtype
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import cfg, denoiser
from tinyldm.diffusion.process import make_process
from tinyldm.diffusion.samplers import ddim, final
from tinyldm.folders.load import load_model
from tinyldm.model import Model
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.pipeline import (
    DrawSettings,
    PromptFeatures,
    draw,
    draw_settings,
    remembering,
)
from tinyldm.quantized import FORMATS, store_weights
from tinyldm.shortcuts import SHORTCUTS, Shortcut
from tinyldm.training.run_folder import find_model

VALUES = {"deep_cache": (2, 3, 5), "first_block_cache": (0.05, 0.1, 0.15, 0.25)}
FEWER = (0.75, 0.6, 0.5, 0.4, 0.25)             # of the steps
SHAPES: dict[str, Callable[[], torch.nn.Module]] = {        # 16 x 1024 is DiT's default
    "sd1.5": lambda: UNet(UNetConfig()), "dit": lambda: DiT(DiTConfig())}


class Row(NamedTuple):
    name: str
    seconds: float          # median
    calls: str              # full ones of all
    error: float            # NaN where nothing is compared


def median_of(rounds: int, rows: Mapping[str, Callable[[], Any]]) -> Iterator[tuple[str, float, Any]]:
    """(name, median seconds, result of the last round) of every row, run in turn."""
    seconds, results = {name: [] for name in rows}, {}
    for _ in range(rounds):
        for name, work in rows.items():
            begun = time.perf_counter()
            results[name] = work()
            seconds[name].append(time.perf_counter() - begun)
    for name in rows:
        yield name, statistics.median(seconds[name]), results[name]


def switches(net: torch.nn.Module) -> dict[str, tuple[str, float]]:
    """Rows of the table -> name and value of a shortcut that the network can have."""
    return {f"--{name.replace('_', '-')} {value:g}": (name, value) for name, kind in SHORTCUTS.items() if isinstance(net, kind.networks)
            for value in VALUES[name]}


def forgetful(work: Callable[[], Any]) -> Any:
    """The work, with keys and values of the text computed in every step."""
    with mock.patch.object(pipeline, "remembering", lambda net, cond: cond):
        return work()


def quantised(model: Model, format: str, work: Callable[[Model], Any]) -> Callable[[], Any]:
    """The work, with a copy of the model whose network is quantised."""
    other = replace(model, net=copy.deepcopy(model.net))
    store_weights(other, format)
    return lambda: work(other)


def table(model: Model, settings: DrawSettings, prompts: Sequence[str], rounds: int = 3) -> list[Row]:
    """The rows of a trained model. settings: of the plain picture."""
    features, shortcuts = PromptFeatures(model), {name: Shortcut(*row, model.net) for name, row in switches(model.net).items()}
    features.prepare(["", *prompts])
    with_settings = lambda how: lambda: draw(model, prompts, range(len(prompts)), how, features=features)
    rows = {"plain": with_settings(settings), "keys and values in every step": lambda: forgetful(with_settings(settings))}
    rows |= {name: with_settings(settings._replace(shortcut=shortcut)) for name, shortcut in shortcuts.items()}
    drawn_by = lambda other: draw(other, prompts, range(len(prompts)), settings, features=features)
    rows |= {f"--quantize {name}": quantised(model, name, drawn_by) for name in FORMATS}
    rows |= {f"{steps} steps": with_settings(draw_settings(model, cfg=settings.cfg, steps=steps))
             for steps in (round(settings.steps * share) for share in FEWER)}
    found, plain = [], None
    for name, seconds, pictures in median_of(rounds, rows):
        plain = pictures if plain is None else plain
        calls = shortcuts.get(name)
        steps = int(name.split()[0]) if name.endswith(" steps") else settings.steps
        found.append(Row(name, seconds, f"{(calls.calls - calls.short) // rounds}/{calls.calls // rounds}" if calls else f"{steps}/{steps}",
                         float(np.sqrt(np.square(pictures.astype(np.float32) - plain).mean()))))
    return found


@torch.no_grad()
def shape_table(net: torch.nn.Module, steps: int, side: int, rounds: int) -> list[Row]:
    """The rows of a network with random weights: `steps` guided steps for one picture of side x side latents. There is nothing to
    compare, and for shortcuts that look at the numbers none is realistic: those run with a threshold that every change is below."""
    dtype, config = next(net.parameters()).dtype, net.config
    levels = grid(make_process("scaled_linear"), steps)
    x, cond = torch.randn(1, config.in_channels, side, side), Cond(torch.randn(2, 77, config.context_dim, dtype=dtype))

    def drawn(shortcut: Shortcut | None = None, memo: bool = True):
        both = denoiser(lambda x, t, cond: net(x.to(dtype), t, cond), remembering(net, cond) if memo else cond, "v")
        return final(ddim(cfg(both if shortcut is None else shortcut.wrap(both, net, levels), 7.5), x, levels))

    used = {name: Shortcut(*row, net) for name, row in switches(net).items()}
    rows = {"plain": drawn, "keys and values in every step": lambda: drawn(memo=False)}
    rows |= {name: lambda shortcut=shortcut: drawn(shortcut) for name, shortcut in used.items()}
    return [Row(name, seconds, f"{(used[name].calls - used[name].short) // rounds}/{steps}" if name in used else f"{steps}/{steps}",
                float("nan")) for name, seconds, _ in median_of(rounds, rows)]


def render(rows: Sequence[Row]) -> str:
    lines = [f"{'':32}{'seconds':>9}{'times':>7}{'full calls':>12}{'error':>8}"]
    return "\n".join(lines + [f"{row.name:32}{row.seconds:9.2f}{rows[0].seconds / row.seconds:7.2f}{row.calls:>12}{row.error:8.2f}"
                              for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="run or model folder, hub id or file")
    add("--shape", choices=SHAPES, help="a network with random weights in a model's place")
    add("--steps", type=int, help="of the plain picture (default: the model's; of a shape 10)")
    add("--cfg", type=float, help="(default: the model's)")
    add("--count", type=int, default=32, help="captions of the toy world")
    add("--side", type=int, default=32, help="of the latents of a shape")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu")
    add("--dtype", default="fp32")
    add("--json", metavar="FILE", help="write the rows too")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.shape:
        torch.manual_seed(0)
        net = SHAPES[args.shape]().to(device, dtype).eval()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.02) if not p.any() else None
        rows = shape_table(net, args.steps or 10, args.side, args.rounds)
    else:
        model = load_model(find_model(args.model), device, dtype)
        prompts = [toyworld.sample(i, 64, 0).caption for i in range(args.count)]
        rows = table(model, draw_settings(model, steps=args.steps, cfg=args.cfg), prompts, args.rounds)
    print(render(rows))
    if args.json:
        Path(args.json).write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    guard(main)
