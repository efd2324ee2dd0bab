"""The plan of a run, before anything is loaded or written: parameters, FLOPs, memory, hours, disk.

Any machine plans a run of any size in seconds: flops.py and memory.py count on the meta device. Hours are projections
from a share of the GPU's peak. compare() holds a running job against its plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from tinyldm.config import Config
from tinyldm.config import stages as configs_of
from tinyldm.device import pick_device
from tinyldm.training.flops import Networks, count_flops, forwards, meta_networks, size
from tinyldm.training.flops import peak_flops as peak_flops
from tinyldm.training.flops import useful_flops as useful_flops
from tinyldm.training.memory import activations, memory
from tinyldm.training.schedule import moment, seconds

ENCODE_MFU = 0.4       # estimate: share of the peak that the VAE's encoder reaches
REST = 0.04            # estimate: share of the running time for sample grids, validation, checkpoints and restarts


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Stage:
    """One stretch of training at one picture size."""

    name: str
    config: Config                  # its own
    batch: int
    micro: int                      # the largest micro-batch
    trained: dict[str, nn.Module]
    frozen: int                     # parameters on the GPU beside them
    flops: dict[str, int]           # per image and part, three times the forward pass where it is trained
    kept: float                     # bytes of activations per image
    casts: int                      # bytes of the weights' casts
    cached: int = 0                 # bytes per picture on disk; 0: stage 1, which has no cache
    steps: int = 0
    encoding: float = 0.0           # hours, a projection

    @property
    def useful(self) -> int:
        """FLOPs of training on one image."""
        return sum(self.flops[part] for part in (("net", "text") if self.cached else self.flops))

    @property
    def rate(self) -> float:
        """Images per second, a projection. --mfu is of what the GPU computes; a forward pass that is run again is not useful."""
        again = self.flops["net"] / 3 if self.cached and self.config.grad_checkpointing else 0
        return self.config.mfu * self.config.gpu_tflops * 1e12 / (self.useful + again)

    @property
    def hours(self) -> float:
        return self.steps * self.batch / self.rate / 3600

    def memory(self, micro: int | None = None) -> dict[str, float]:
        """Bytes on the GPU, by kind."""
        return memory(self.config, self.trained, self.frozen, self.kept * (micro or self.micro), self.casts)

    def need(self, micro: int | None = None) -> float:
        """GB in all."""
        return sum(self.memory(micro).values()) / 1e9


class Plan(NamedTuple):
    config: Config
    networks: Networks
    stages: list[Stage]
    pictures: int                   # 0: not known
    given: float                    # hours of the budget; 0: none

    @property
    def used(self) -> float:
        """Hours in all, a projection."""
        return sum(s.hours + s.encoding for s in self.stages) / (1 - REST)


def make_plan(config: Config, must_fit: bool = True) -> Plan:
    """ValueError, with the knob to turn, where a stage does not fit the GPU."""
    for name in ("mfu", "gpu_tflops", "gpu_gb"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be above 0")
    networks, parts, given = meta_networks(config), configs_of(config), given_hours(config)
    first = [] if config.vae_weights else [vae_stage(parts[0], networks)]
    stages = [*first, *(diffusion_stage(part, networks) for part in parts)]
    if must_fit:
        for place, stage in enumerate(stages, -len(first)):
            check_fit(config, stage, place)
    pictures = config.scenes if config.data == ["toyworld"] else config.pictures
    if not config.cache:
        speed = ENCODE_MFU * config.gpu_tflops * 1e12 * 3600                                   # FLOPs per hour
        stages = [replace(s, encoding=pictures * s.flops["encode"] / speed) if s.cached else s for s in stages]
    left = given * (1 - REST) - sum(s.encoding + s.hours for s in stages)                      # hours are stage 1's so far
    return Plan(config, networks, [*first, *shared_out(config, stages[len(first):], left)], pictures, given)


def given_hours(config: Config) -> float:
    """Running time from now to the end of the budget or to the deadline, whichever comes first; 0: steps decide."""
    ends = [seconds(config.budget)] if config.budget else []
    if config.deadline:
        ends.append(moment(config.deadline) - time.time())
        if ends[-1] <= 0:
            raise ValueError(f"--deadline {config.deadline} has passed: name a later one")
    return min(ends, default=0.0) / 3600


def shared_out(config: Config, stages: list[Stage], hours: float) -> list[Stage]:
    """The same stages with their steps: shares of so many hours, or of --max-steps where that is given."""
    shares, done, result = config.stages or {str(config.resolution): 1.0}, 0.0, []
    for stage, share in zip(stages, shares.values()):
        begin, done = done, done + share / sum(shares.values())
        steps = (round(config.max_steps * done) - round(config.max_steps * begin) if config.max_steps
                 else int((done - begin) * max(hours, 0.0) * 3600 * stage.rate / stage.batch))
        result.append(replace(stage, steps=steps))
    return result


def vae_stage(config: Config, networks: Networks) -> Stage:
    """Stage 1: the VAE on crops."""
    side, batch, vae = min(config.vae_crop or config.resolution, config.resolution), config.vae_batch_size, networks.vae
    calls = {part: call for part, call in forwards(networks, side).items() if part in ("encode", "decode")}
    flops = {part: 3 * count_flops(call) for part, call in calls.items()}
    kept, casts = activations(config, *((vae, call) for call in calls.values()))
    return Stage(f"VAE, {side} px", config, batch, batch, {"vae": vae}, 0, flops, kept, casts, steps=config.vae_steps)


def diffusion_stage(config: Config, networks: Networks) -> Stage:
    """Stage 2 on pictures of one size."""
    (net, text, vae), side, calls = networks, config.resolution, forwards(networks, config.resolution)
    trained = {"net": net} if config.text_weights else {"net": net, "text": text}
    flops = {part: (3 if part in trained else 1) * count_flops(call) for part, call in calls.items()}
    kept, casts = activations(config, *((module, calls[part]) for part, module in trained.items()))
    latent = vae.config.latent_channels * (side // vae.config.downscale) ** 2
    return Stage(f"{side} px", config, config.batch_size, -(-config.batch_size // config.grad_accum), trained,
                 size(*networks) - size(*trained.values()), flops, kept, casts,
                 cached=2 * (latent + text.config.context_length))                             # fp16, and 16-bit token ids


def check_fit(config: Config, stage: Stage, place: int) -> None:
    """ValueError, with what would fit, where a stage does not. place: its place among the diffusion stages; -1: the VAE."""
    if stage.need() <= config.gpu_gb:
        return
    divisors = [m for m in range(1, stage.batch + 1) if stage.batch % m == 0]
    if place < 0:
        options = [(f"--vae-batch-size {micro}", micro) for micro in reversed(divisors)]
    else:                                                      # the flag is the first stage's, others follow from it
        scaled = {accum: -(-stage.batch // configs_of(replace(config, grad_accum=accum))[place].grad_accum) for accum in divisors}
        options = [(f"--grad-accum {accum} (micro-batch {micro})", micro) for accum, micro in scaled.items()]
    found = next(((knob, micro) for knob, micro in options if stage.need(micro) <= config.gpu_gb), None)
    again = " or --grad-checkpointing" if place >= 0 and not config.grad_checkpointing else ""
    advice = (f"{found[0]} would fit, at {stage.need(found[1]):.1f} GB" if found else
              f"single images need {stage.need(1):.1f} GB, so shrink it (--{'vae' if place < 0 else config.network}{again})")
    raise ValueError(f"micro-batch {stage.micro} at {stage.name} needs {stage.need():.1f} GB "
                     f"(estimate), the GPU has {config.gpu_gb:g} (--gpu-gb): {advice}")


# ---------------------------------------------------------------- telling it


def render(plan: Plan) -> str:
    config, networks, stages, pictures, _ = plan
    lines = [f"plan of --preset {config.preset}: nothing is loaded, trained or written", "", "parameters"]

    def row(label: str, cell: Callable[[Stage], str], diffusion: bool = False) -> None:
        lines.append(f"  {label:46}" + "".join(f"{cell(s) if s.cached or not diffusion else '':>16}" for s in stages))

    names = dict(net=config.network, text="text encoder", vae="VAE", encode="VAE encoder", decode="VAE decoder")
    weights = {"net": "", "text": config.text_weights, "vae": config.vae_weights}
    for part, module in networks._asdict().items():
        state = f"frozen: {weights[part]}" if weights[part] else "trained"
        lines.append(f"  {names[part]:20}{size(module):14,}  {state}")
    lines += ["", f"{'GFLOP per image: forward, x 3 where trained':48}" + "".join(f"{s.name:>16}" for s in stages)]
    for part in stages[-1].flops:
        row(names[part], lambda s: f"{s.flops[part] / 1e9:,.4g}" if part in s.flops else "")
    lines += ["", f"memory, GB of {config.gpu_gb:g}"]
    row("micro-batch x accumulation", lambda s: f"{s.micro} x {s.config.grad_accum if s.cached else 1}")
    for kind in stages[0].memory():
        row(kind, lambda s: f"{s.memory()[kind] / 1e9:.3f}")
    row("all", lambda s: f"{s.need():.3f}")
    lines += ["", f"time (projection: {config.mfu:.0%} of {config.gpu_tflops:g} TFLOP/s)"]
    row("images per second", lambda s: f"{s.rate:,.0f}")
    row("steps", lambda s: f"{s.steps:,}")
    row("images", lambda s: f"{s.steps * s.batch:,}")
    row("time", lambda s: span(s.hours))
    if pictures:
        row(f"epochs over {pictures:,} pictures", lambda s: f"{s.steps * s.batch / pictures:,.1f}", diffusion=True)
        row("GB on disk (latents in fp16, token ids)", lambda s: f"{pictures * s.cached / 1e9:,.3g}", diffusion=True)
        row(f"time to encode them (at {ENCODE_MFU:.0%})", lambda s: span(s.encoding), diffusion=True)
    return "\n".join([*lines, *shares_of_time(plan)])


def span(hours: float) -> str:
    """A length of time, for people."""
    size, unit = next(((size, unit) for size, unit in ((1, "h"), (1 / 60, "min")) if hours >= size), (1 / 3600, "s"))
    return f"{hours / size:,.3g} {unit}"


def shares_of_time(plan: Plan) -> list[str]:
    """Where the hours go, and whether there are enough."""
    encoding, training = (sum(getattr(s, name) for s in plan.stages) for name in ("encoding", "hours"))
    before = encoding + sum(s.hours for s in plan.stages if not s.cached)
    whole = plan.given or plan.used
    lines = [f"  in all {span(whole)}: encoding {span(encoding)}, training {span(training)}, evaluation and restarts {span(whole * REST)}"]
    if plan.given and (not plan.stages[-1].steps or before > encoding + training - before):
        end = "--budget" if plan.config.budget else "--deadline"
        lines.append(f"  TOO MUCH for {end}: what comes before the training leaves it too little; use fewer --pictures or more time")
    if not plan.pictures and not plan.config.cache:
        lines.append("  (without the hours of encoding: --pictures N says how many there are)")
    return lines


def print_plan(config: Config) -> None:
    """What train.py --dry-run shows."""
    print(render(make_plan(config)))


class Measured(NamedTuple):
    """What a running job has found out."""

    seconds_per_step: float
    images_per_second: float
    mfu: float | None               # share of peak_flops; None: not known
    memory_gb: float | None         # the largest so far, 10^9 bytes
    steps: int                      # in all, all stages
    finish: str


def compare(config: Config, measured: Measured, whole: Config | None = None, after: int = 200) -> str:
    """A few lines that hold a stage's running against its plan: projections for --gpu-tflops at --mfu.

    config   the running stage's
    whole    the run's, where it has several stages: steps and finish are the whole run's
    after    steps

    "-" where a number is not to be had; never an error."""
    plan, stage = None, None
    try:
        plan = make_plan(whole or config, must_fit=False)
        stage = next((s for s in plan.stages if s.cached and s.config.resolution == config.resolution), None)
    except ValueError:                                         # a deadline that has passed, sizes of another VAE
        pass
    told = lambda value, how: "-" if value is None else format(value, how)
    useful = stage and stage.useful / 1e12
    rows = [("seconds per step", ".4g", stage and stage.batch / stage.rate, measured.seconds_per_step),
            ("images per second", ",.4g", stage and stage.rate, measured.images_per_second),
            ("TFLOP/s, useful", ",.4g", stage and stage.rate * useful, stage and measured.images_per_second * useful),
            ("MFU", ".1%", stage and stage.rate * useful / config.gpu_tflops, measured.mfu),
            ("memory, GB", ".3g", stage and stage.need(), measured.memory_gb),
            ("steps in all", ",", plan and sum(s.steps for s in plan.stages if s.cached), measured.steps),
            ("finish", "", plan and planned_finish(plan), measured.finish)]
    lines = [f"{f'after {after} steps':20}{'plan':>20}{'measured':>20}"]
    lines += [f"  {label:18}{told(planned, how):>20}{told(found, how):>20}" for label, how, planned, found in rows]
    device = pick_device(config.device).type
    if device != "cuda":
        lines.append(f"  (the plan is for a GPU of {config.gpu_tflops:g} TFLOP/s, this is {'a CPU' if device == 'cpu' else device})")
    return "\n".join(lines)


def planned_finish(plan: Plan) -> str:
    if plan.given and plan.config.deadline and plan.given < (seconds(plan.config.budget) / 3600 if plan.config.budget else float("inf")):
        return plan.config.deadline
    return f"after {plan.config.budget}" if plan.config.budget else f"after {span(plan.used)}"
