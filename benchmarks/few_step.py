"""Every few-step objective on the 2-D mixture: how well one, two and four steps draw it, beside the teacher's. Makes docs/few_steps.png.

    python benchmarks/few_step.py                        all objectives, some minutes on one CPU thread
    python benchmarks/few_step.py --only lcm scm         some of them
    python benchmarks/few_step.py --steps 200 --teacher-steps 500      a quick look

The data are eight Gaussians on a ring, as latents of one pixel with two channels, so the objectives run as they do on pictures. The network
is a DiT of one token, which is an MLP. The teacher is a flow; students begin as copies of it and take the same number of training steps (a
column has the seconds, since a step costs from two to six forward passes). The measure is the sliced Wasserstein distance of 4000 draws to
as many exact ones, of which the mean distance of two exact sets is printed. Writes OUT/few_step.json; needs matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tinyldm.config import make_config
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.noise import make_generators
from tinyldm.diffusion.process import make_process
from tinyldm.diffusion.samplers import final, find_sampler
from tinyldm.model import Model, told_too
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.objectives import OBJECTIVES, Objective, turns_at
from tinyldm.objectives.teacher import move_average
from tinyldm.pipeline import tell_elapsed
from tinyldm.random_streams import Stream, generator
from tinyldm.training.distributed import World
from tinyldm.vendor_loaders.scheduler import to_config

ROOT = Path(__file__).parent.parent
MODES, STD = 8, 0.12
BATCH, DRAWN, COUNTS = 256, 4000, (1, 2, 4)
NET = dict(in_channels=2, out_channels=2, patch=1, width=96, layers=3, heads=2, mlp_width=192, context_dim=8, time_dim=64)
ROWS: dict[str, tuple[str, dict]] = {       # objective, its options; guidance is off, since there are no captions
    "consistency (ect)": ("consistency", {}),
    "consistency (ict)": ("consistency", dict(schedule="ict", c=0.00054)),
    "consistency, distilled": ("consistency", dict(schedule="ict", distil=True, ema=0.95, s0=20, s1=80)),
    "lcm": ("lcm", dict(scale=1.0)),
    "scm": ("scm", dict(scale=1.0)),
    "mean_flow": ("mean_flow", dict(scale=1.0)),
    "mean_flow without teacher": ("mean_flow", dict(scale=1.0, distil=False)),
    "progressive": ("progressive", dict(scale=1.0, rounds=(16, 8, 4, 2, 1))),
    "reflow": ("reflow", dict(scale=1.0, steps=64, pairs=20_000)),
    "reflow, distilled": ("reflow", dict(scale=1.0, steps=64, pairs=20_000, distil=True)),
    "self_corrected": ("self_corrected", dict(scale=1.0)),
    "dmd": ("dmd", dict(scale=1.0, steps=2, every=2)),
    "dmd, SenseFlow": ("dmd", dict(scale=1.0, steps=2, every=2, align=0.98, segment=0.5)),
}


class NoText:
    """In place of text encoders: every caption is the empty one."""

    modules: dict[str, nn.Module] = {}

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        return torch.zeros(len(captions), 1, dtype=torch.long)

    def encode_ids(self, ids: Tensor, *rest: object, **options: object) -> Cond:
        return Cond(torch.zeros(len(ids), 1, NET["context_dim"]))


def data(count: int, seed: int) -> Tensor:
    """Draws of the mixture, [n, 2, 1, 1], of unit variance."""
    random = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi / MODES * torch.randint(MODES, (count,), generator=random)
    ring = math.sqrt(2 * (1 - STD**2))
    x = ring * torch.stack([angle.cos(), angle.sin()], 1) + STD * torch.randn(count, 2, generator=random)
    return x.view(count, 2, 1, 1)


def train(name: str, options: dict, steps: int, teacher: Model | None, seed: int = 0) -> tuple[Model, float]:
    """Train a model by an objective, from the teacher on where there is one -> (it, with averaged weights; seconds)."""
    torch.manual_seed(seed)
    kind, flat = OBJECTIVES[name], dict(objective=name, objective_options=options, dtype="fp32", network="dit", dit=NET)
    flat |= dict(finetune="whole", model="-") if teacher else {}
    usual = kind.usual(make_config(**flat))
    config = make_config(**flat, times=usual.get("times", "logit_normal"), times_mean=usual.get("mean"), times_scale=usual.get("scale"),
                         caption_dropout=0.0, batch_size=BATCH)
    kind.check(config)
    net = told_too(copy.deepcopy(teacher.net) if teacher else DiT(DiTConfig(**NET)), kind.tells(config)).requires_grad_(True).train()
    model = Model(net, None, NoText(), make_process("flow"), "flow", to_config("flow", {}, "flow", "euler"), usual)
    objective = kind(config, model, ("net",), *([copy.copy(teacher)] if kind.taught(config) else []))
    average, rate, began = copy.deepcopy(net), 1e-3 if teacher else 2e-3, time.perf_counter()
    networks = {"net": net, **objective.networks}
    trained = {turn.name: [p for part in turn.trains for p in networks[part].parameters()] for turn in objective.turns}
    optimizers = {turn: torch.optim.Adam(weights, rate, (0.9, 0.99)) for turn, weights in trained.items()}
    samples = lambda position: SimpleNamespace(latents=data(BATCH, 7919 * seed + position), tokens=model.text.tokenize([""] * BATCH),
                                               weights=None, sizes=None)
    with tempfile.TemporaryDirectory() as folder:
        prepare(objective, Path(folder), samples)
        for step in range(steps):
            batch = objective.draw(samples(step), generator(Stream.NOISE, seed, step), BATCH, slice(None))
            batch = objective.to_device(batch, torch.device("cpu"))
            for turn in turns_at(objective, step, step / steps):
                objective.losses(turn, networks, batch, step / steps).mean().backward()
                nn.utils.clip_grad_norm_(trained[turn.name], 1.0)
                optimizers[turn.name].param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
                optimizers[turn.name].step()
                for network in networks.values():
                    network.zero_grad()
            objective.after_step(step + 1)
            move_average(average, net, min(0.99, (step + 1) / (step + 10)))
    model.net = average.eval().requires_grad_(False)
    return model, time.perf_counter() - began


def prepare(objective: Objective, folder: Path, samples: Callable[[int], SimpleNamespace]) -> None:
    """What is drawn before the training, as the trainer has it done."""
    objective.prepare(SimpleNamespace(folder=folder, world=World(), device=torch.device("cpu"), check=lambda: None), lambda: samples)


@torch.no_grad()
def draw(model: Model, sampler: str, steps: int, seed: int = 1) -> Tensor:
    levels, x = grid(model.process, steps), torch.randn(DRAWN, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    net = tell_elapsed(model.net, levels) if "elapsed" in model.net.config.told else model.net
    denoise = denoiser(net, model.text.encode_ids(torch.zeros(DRAWN, 1)), "flow")
    return final(find_sampler(sampler)(denoise, x, levels, generators=make_generators(range(DRAWN))))


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 64) -> float:
    """The mean over directions of the Wasserstein-1 distance of two sets of as many points."""
    angle = math.pi * (torch.arange(directions) + 0.5) / directions
    axes = torch.stack([angle.cos(), angle.sin()])                                          # [2, directions]
    sort = lambda points: (points.flatten(1).float() @ axes).sort(0).values
    return (sort(x) - sort(y)).abs().mean().item()


def measure(model: Model, sampler: str, counts: Sequence[int]) -> dict[str, float]:
    exact = data(DRAWN, 10**6)
    return {str(steps): round(sliced_wasserstein(draw(model, sampler, steps), exact), 4) for steps in counts}


def picture(models: dict[str, tuple[Model, str]], file: Path) -> None:
    """A column for every model: what it draws in one and in two steps, and how single points go from noise to data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(models), figsize=(2.4 * len(models), 5), squeeze=False)
    for column, (name, (model, sampler)) in zip(axes.T, models.items()):
        for axis, steps in zip(column, (1, 2)):
            axis.plot(*data(DRAWN, 10**6)[:1500, :, 0, 0].T, ".", color="0.85", markersize=2)
            x = torch.randn(DRAWN, 2, generator=torch.Generator().manual_seed(1))
            drawn = draw(model, sampler, steps)[:, :, 0, 0]
            axis.plot(*drawn[:1000].T, ".", color="C0", markersize=1.5)
            for i in range(12):
                axis.plot(*torch.stack([x[i], drawn[i]]).T, "-", color="C3", linewidth=0.6)
            axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
        column[0].set_title(name.replace(", ", ",\n").replace(" without", "\nwithout"), fontsize=9)
    for row, steps in zip(axes, ("one step", "two steps")):
        row[0].set_ylabel(steps)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each student")
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--only", nargs="+", default=[], help="names of rows, or of objectives")
    parser.add_argument("--out", type=Path, default=Path("runs/few_step"))
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "few_steps.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "few_step.json"
    floor = sum(sliced_wasserstein(data(DRAWN, seed), data(DRAWN, 10**6)) for seed in range(8)) / 8
    teacher, seconds = train("denoising", {}, args.teacher_steps, None)
    found = {"two exact sets": {"": round(floor, 4)}, "teacher": measure(teacher, "euler", (*COUNTS, 8, 64)) | {"seconds": round(seconds)}}
    models = {"teacher": (teacher, "euler")}
    print(json.dumps(found), flush=True)
    for name, (objective, options) in ROWS.items():
        if args.only and not {name, objective} & {*args.only}:
            continue
        model, seconds = train(objective, options, args.steps, teacher)
        models[name] = model, model.defaults["sampler"]
        found[name] = measure(model, model.defaults["sampler"], COUNTS) | {"seconds": round(seconds)}
        print(f"{name:28}" + "".join(f"{key:>8} {value:<8}" for key, value in found[name].items()), flush=True)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    picture(models, args.picture)
    print(f"{file}, {args.picture}")


if __name__ == "__main__":
    main()
