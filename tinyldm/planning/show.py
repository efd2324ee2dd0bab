"""Prints the plan of a run (train.py --dry-run), and compares a running job with its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tinyldm.config import Config
from tinyldm.device import pick_device
from tinyldm.durations import parse_duration, show_duration
from tinyldm.planning.finetune import render_fitting, render_published
from tinyldm.planning.flops import assumed_vae, on_this_gpu, size
from tinyldm.planning.phase import GRID_PICTURES, PlannedPhase
from tinyldm.planning.plan import ENCODE_UTILISATION, OVERHEAD, Plan, make_plan
from tinyldm.planning.step import step_seconds
from tinyldm.planning.texts import assumed


def render(plan: Plan) -> str:
    config, networks, planned, pictures, _ = plan
    own, kind = config.finetune, "--finetune" if config.finetune.kind else "--preset"
    alone = not planned[-1].cache_bytes                         # an autoencoder or a CLIP alone: no latents, and nothing is drawn
    lines = [f"plan of {kind} {config.run.preset}: nothing is loaded, trained or written", "", "parameters"]

    def row(label: str, cell: Callable[[PlannedPhase], str], diffusion: bool = False) -> None:
        if diffusion and alone:
            return
        lines.append(f"  {label:46}" + "".join(f"{cell(s) if s.cache_bytes or not diffusion else '':>16}" for s in planned))

    factor = "2" if own.kind and not own.whole else "3"         # without gradients of the weights
    names = dict(net="picture tower" if alone else config.network.name, text="text encoder", vae="VAE", encode="VAE encoder",
                 decode="VAE decoder", pairs="pairs")
    weights = {"net": own.model * (not own.whole), "text": config.text.weights, "vae": config.autoencoder.weights}
    for part, module in ((part, module) for part, module in networks._asdict().items() if size(module)):
        state = f"frozen: {weights[part]}" if weights[part] else "trained"
        lines.append(f"  {names[part]:20}{size(module):14,}  {state}")
    if own.kind and not own.whole:
        lines.append(f"  {'adapter' if own.adapts else 'new vectors':20}{size(*planned[-1].trained.values()):14,}  trained")
    vae = assumed_vae(config) if size(networks.vae) and not own.kind else ""    # the model of --finetune brings its own
    lines += [f"  ({assumption})" for assumption in (assumed(config), vae) if assumption]
    lines += ["", f"{f'GFLOP per image: forward, x {factor} where trained':48}" + "".join(f"{s.name:>16}" for s in planned)]
    for part in planned[-1].flops:
        row(names[part], lambda s: f"{s.flops[part] / 1e9:,.4g}" if part in s.flops else "")
    lines += ["", f"memory, GB of {config.plan.gpu_gb:g}"]
    cut = lambda s: s.config.optimisation.grad_accum if s.cache_bytes or alone else 1
    row("micro-batch x accumulation", lambda s: f"{s.micro} x {cut(s)}")
    for kind in planned[0].memory():
        row(kind, lambda s: f"{s.memory()[kind] / 1e9:.3f}")
    row("all", lambda s: f"{s.memory_gb():.3f}")
    row(f"encoding, {config.data.encode_batch_size} pictures at once (estimate)", lambda s: f"{s.encoding_gb(networks.vae):.3f}",
        diffusion=True)
    row(f"sample grid, {GRID_PICTURES} pictures (estimate)", lambda s: f"{s.grid_gb():.3f}", diffusion=True)
    compiled = "" if alone else f"; the network is {'compiled' if planned[-1].compiled else 'not compiled'}"
    lines += ["", f"time (projection: {config.plan.utilisation:.0%} of {config.plan.gpu_tflops:g} TFLOP/s{compiled})"]
    row("images per second", lambda s: f"{s.rate:,.0f}")
    row("steps", lambda s: f"{s.steps:,}")
    row("images", lambda s: f"{s.steps * s.batch:,}")
    row("seconds per step", lambda s: f"{s.batch / s.rate:.4g}")
    for part in () if alone else step_seconds(planned[-1]):
        row(f"  of which {part} (estimate)", lambda s: f"{step_seconds(s)[part]:.2g}", diffusion=True)
    row("time", lambda s: show_duration(3600 * s.hours))
    if pictures:
        row(f"epochs over {pictures:,} pictures", lambda s: f"{s.steps * s.batch / pictures:,.1f}", diffusion=True)
        row("GB on disk (latents in fp16, sizes, token ids)", lambda s: f"{pictures * s.cache_bytes / 1e9:,.3g}", diffusion=True)
        utilisation = ENCODE_UTILISATION[planned[-1].compiled]
        row(f"time to encode them (at {utilisation:.0%})", lambda s: show_duration(3600 * s.encoding), diffusion=True)
    return "\n".join([*lines, *render_hours(plan)])


def render_hours(plan: Plan) -> list[str]:
    """Lines on how the hours are spent, and a warning where there are too few."""
    encoding, training = (sum(getattr(s, name) for s in plan.phases) for name in ("encoding", "hours"))
    before = encoding + sum(s.hours for s in plan.phases if not s.cache_bytes)
    total = plan.budget_hours or plan.hours
    shown = {"encoding": encoding, "training": training, "evaluation and restarts": total * OVERHEAD}
    parts = ", ".join(f"{what} {show_duration(3600 * hours)}" for what, hours in shown.items())
    lines = [f"  in all {show_duration(3600 * total)}: {parts}"]
    if not plan.phases[-1].cache_bytes:
        return lines
    if plan.budget_hours and (not plan.phases[-1].steps or before > encoding + training - before):
        end = "--budget" if plan.config.optimisation.budget else "--deadline"
        lines.append(f"  TOO MUCH for {end}: the first stage and the encoding leave too little; use fewer --pictures or more time")
    if not plan.pictures and not plan.config.data.cache:
        lines.append("  (without the hours of encoding, which need the number of pictures: --pictures N)")
    return lines


def print_plan(config: Config) -> None:
    """Print the plan, for train.py --dry-run; of --finetune without a model, that of adapters beside all published ones."""
    if config.finetune.kind and not config.finetune.model:
        return print(render_published(config))
    if config.finetune.kind:                                    # which GPUs have room is a part of the answer
        return print("\n".join([render(make_plan(config, must_fit=False)), *render_fitting(config)]))
    print(render(make_plan(config)))


class Measured(NamedTuple):
    """Measurements of a running job."""

    seconds_per_step: float
    images_per_second: float
    mfu: float | None               # model FLOPs utilisation, a fraction of peak_flops; None: not known
    memory_gb: float | None         # the largest so far, 10^9 bytes
    steps: int                      # in all, all planned
    finish: str


def compare(config: Config, measured: Measured, whole: Config | None = None, after: int = 200, planned: bool = True) -> str:
    """A table that compares measurements with the plan, whose times are projections for this machine's GPU at --utilisation, or for
    --gpu-tflops where it has none or an unknown one.

    config   settings of the phase that was measured
    whole    settings of the run, where it has several phases: `steps in all` and `finish` are the whole run's
    after    number of steps that were measured
    planned  whether the plan is shown: on a CPU, for which it is not made, train.py shows the measurements alone

    A number that is not known is shown as "-"; this never raises an error."""
    plan, phase, device = None, None, pick_device(config.run.device)
    config = on_this_gpu(config, device)
    try:
        plan = make_plan(on_this_gpu(whole or config, device), must_fit=False)
        main = plan.phases if config.run.only else [s for s in plan.phases if s.cache_bytes]
        phase = next((s for s in main if s.config.data.resolution == config.data.resolution), None)
    except ValueError:                                         # the deadline has passed, or the VAE has another downscale
        pass
    show = lambda value, form: "-" if value is None else format(value, form)
    useful = phase and phase.useful / 1e12
    rows = [("seconds per step", ".4g", phase and phase.batch / phase.rate, measured.seconds_per_step),
            ("images per second", ",.4g", phase and phase.rate, measured.images_per_second),
            ("TFLOP/s, useful", ",.4g", phase and phase.rate * useful, phase and measured.images_per_second * useful),
            ("MFU", ".1%", phase and phase.rate * useful / config.plan.gpu_tflops, measured.mfu),
            ("memory, GB", ".3g", phase and phase.memory_gb(), measured.memory_gb),
            ("steps in all", ",", plan and sum(s.steps for s in main), measured.steps),
            ("finish", "", plan and planned_finish(plan), measured.finish)]
    if not planned:
        measurements = [f"  {label:18}{show(found, form):>20}" for label, form, _, found in rows if found is not None]
        return "\n".join([f"{f'after {after} steps':20}{'measured':>20}", *measurements])
    lines = [f"{f'after {after} steps':20}{'plan':>20}{'measured':>20}"]
    lines += [f"  {label:18}{show(expected, form):>20}{show(found, form):>20}" for label, form, expected, found in rows]
    if device.type != "cuda":
        this = "a CPU" if device.type == "cpu" else device.type
        lines.append(f"  (the plan is for a GPU of {config.plan.gpu_tflops:g} TFLOP/s, this is {this})")
    return "\n".join(lines)


def planned_finish(plan: Plan) -> str:
    length = plan.config.optimisation
    if length.deadline and (not length.budget or plan.budget_hours < parse_duration(length.budget) / 3600):
        return length.deadline
    return f"after {length.budget or show_duration(3600 * plan.hours)}"
