"""The plan of a run as text: what train.py --dry-run prints, and how a running job compares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tinyldm.config import Config
from tinyldm.device import pick_device
from tinyldm.durations import parse_duration, show_duration
from tinyldm.planning.flops import size
from tinyldm.planning.plan import ENCODE_UTILISATION, OVERHEAD, Plan, Stretch, make_plan


def render(plan: Plan) -> str:
    config, networks, stretches, pictures, _ = plan
    lines = [f"plan of --preset {config.run.preset}: nothing is loaded, trained or written", "", "parameters"]

    def row(label: str, cell: Callable[[Stretch], str], diffusion: bool = False) -> None:
        lines.append(f"  {label:46}" + "".join(f"{cell(s) if s.cached or not diffusion else '':>16}" for s in stretches))

    names = dict(net=config.network.name, text="text encoder", vae="VAE", encode="VAE encoder", decode="VAE decoder")
    weights = {"net": "", "text": config.text.weights, "vae": config.autoencoder.weights}
    for part, module in networks._asdict().items():
        state = f"frozen: {weights[part]}" if weights[part] else "trained"
        lines.append(f"  {names[part]:20}{size(module):14,}  {state}")
    lines += ["", f"{'GFLOP per image: forward, x 3 where trained':48}" + "".join(f"{s.name:>16}" for s in stretches)]
    for part in stretches[-1].flops:
        row(names[part], lambda s: f"{s.flops[part] / 1e9:,.4g}" if part in s.flops else "")
    lines += ["", f"memory, GB of {config.plan.gpu_gb:g}"]
    row("micro-batch x accumulation", lambda s: f"{s.micro} x {s.config.optimisation.grad_accum if s.cached else 1}")
    for kind in stretches[0].memory():
        row(kind, lambda s: f"{s.memory()[kind] / 1e9:.3f}")
    row("all", lambda s: f"{s.need():.3f}")
    lines += ["", f"time (projection: {config.plan.utilisation:.0%} of {config.plan.gpu_tflops:g} TFLOP/s)"]
    row("images per second", lambda s: f"{s.rate:,.0f}")
    row("steps", lambda s: f"{s.steps:,}")
    row("images", lambda s: f"{s.steps * s.batch:,}")
    row("time", lambda s: show_duration(3600 * s.hours))
    if pictures:
        row(f"epochs over {pictures:,} pictures", lambda s: f"{s.steps * s.batch / pictures:,.1f}", diffusion=True)
        row("GB on disk (latents in fp16, token ids)", lambda s: f"{pictures * s.cached / 1e9:,.3g}", diffusion=True)
        row(f"time to encode them (at {ENCODE_UTILISATION:.0%})", lambda s: show_duration(3600 * s.encoding), diffusion=True)
    return "\n".join([*lines, *shares_of_time(plan)])


def shares_of_time(plan: Plan) -> list[str]:
    """Where the hours go, and whether there are enough."""
    encoding, training = (sum(getattr(s, name) for s in plan.stretches) for name in ("encoding", "hours"))
    before = encoding + sum(s.hours for s in plan.stretches if not s.cached)
    whole = plan.given or plan.used
    shown = {"encoding": encoding, "training": training, "evaluation and restarts": whole * OVERHEAD}
    lines = [f"  in all {show_duration(3600 * whole)}: " + ", ".join(f"{what} {show_duration(3600 * hours)}" for what, hours in shown.items())]
    if plan.given and (not plan.stretches[-1].steps or before > encoding + training - before):
        end = "--budget" if plan.config.optimisation.budget else "--deadline"
        lines.append(f"  TOO MUCH for {end}: what comes before the training leaves it too little; use fewer --pictures or more time")
    if not plan.pictures and not plan.config.data.cache:
        lines.append("  (without the hours of encoding: --pictures N says how many there are)")
    return lines


def print_plan(config: Config) -> None:
    """What train.py --dry-run shows."""
    print(render(make_plan(config)))


class Measured(NamedTuple):
    """What a running job has measured."""

    seconds_per_step: float
    images_per_second: float
    mfu: float | None               # share of peak_flops; None: not known
    memory_gb: float | None         # the largest so far, 10^9 bytes
    steps: int                      # in all, all stretches
    finish: str


def compare(config: Config, measured: Measured, whole: Config | None = None, after: int = 200) -> str:
    """A few lines that hold what was measured against the plan: projections for --gpu-tflops at --utilisation.

    config   of the phase that was measured
    whole    of the run, where it has several phases: steps and finish are those of the whole run
    after    number of steps that were measured

    "-" where a number is not to be had; never an error."""
    plan, stretch = None, None
    try:
        plan = make_plan(whole or config, must_fit=False)
        stretch = next((s for s in plan.stretches if s.cached and s.config.data.resolution == config.data.resolution), None)
    except ValueError:                                         # a deadline that has passed, sizes of another VAE
        pass
    show = lambda value, form: "-" if value is None else format(value, form)
    useful = stretch and stretch.useful / 1e12
    rows = [("seconds per step", ".4g", stretch and stretch.batch / stretch.rate, measured.seconds_per_step),
            ("images per second", ",.4g", stretch and stretch.rate, measured.images_per_second),
            ("TFLOP/s, useful", ",.4g", stretch and stretch.rate * useful, stretch and measured.images_per_second * useful),
            ("MFU", ".1%", stretch and stretch.rate * useful / config.plan.gpu_tflops, measured.mfu),
            ("memory, GB", ".3g", stretch and stretch.need(), measured.memory_gb),
            ("steps in all", ",", plan and sum(s.steps for s in plan.stretches if s.cached), measured.steps),
            ("finish", "", plan and planned_finish(plan), measured.finish)]
    lines = [f"{f'after {after} steps':20}{'plan':>20}{'measured':>20}"]
    lines += [f"  {label:18}{show(planned, form):>20}{show(found, form):>20}" for label, form, planned, found in rows]
    device = pick_device(config.run.device).type
    if device != "cuda":
        lines.append(f"  (the plan is for a GPU of {config.plan.gpu_tflops:g} TFLOP/s, this is {'a CPU' if device == 'cpu' else device})")
    return "\n".join(lines)


def planned_finish(plan: Plan) -> str:
    length = plan.config.optimisation
    if length.deadline and (not length.budget or plan.given < parse_duration(length.budget) / 3600):
        return length.deadline
    return f"after {length.budget or show_duration(3600 * plan.used)}"
