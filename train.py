"""Train a latent diffusion model: a VAE first (or a pretrained one), then the network on its latents.

    python train.py --preset tiny                            a whole miniature Stable Diffusion, minutes on a laptop
    python train.py --preset tiny --resume auto              go on where an interrupted run stopped
    python train.py --data "shards/*.tar" --out runs/mine    your own captioned pictures (or a folder of them, or a URL)
    python train.py --cache CACHE --vae-weights V --out ...  latents that prepare.py made before
    python train.py --preset 5090_week --dry-run             the plan of a week on one RTX 5090
    python train.py --preset tiny --budget 20m               whatever can be learnt in this time
    torchrun --nproc-per-node 4 train.py ...                 several GPUs: the same batches, shared out

Any field of tinyldm.config.Config is a flag; network fields are KEY=VALUE pairs (--unet widths=64,128,256 depth=2).
Everything lands in runs/PRESET (or --out): report.html, log.jsonl, samples/, checkpoints/. Then: python sample.py "a red fox"
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from tinyldm.cli import guard
from tinyldm.config import Config, parse, stages

FLAGS = {"--dry-run": dict(action="store_true", help="print the plan (sizes, FLOPs, memory, hours) and stop")}
BEGUN = time.monotonic()                                     # of the running time, loading included

if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    CONFIG, ARGS = parse(sys.argv[1:], __doc__, FLAGS)

import torch
from torch import Tensor

from tinyldm.data.cache import Cache
from tinyldm.device import autocast, deterministic, pick_device, prefer_plain_attention
from tinyldm.diffusion.loss import make_noise, sample_losses, sample_t
from tinyldm.diffusion.process import make_process
from tinyldm.files import write_file
from tinyldm.models.vae import AutoencoderKL
from tinyldm.pipeline import draw, encode_tokens, settings
from tinyldm.sheet import tile
from tinyldm.training import checkpoint
from tinyldm.training.budget import Measured, compare, peak_flops, print_plan, useful_flops
from tinyldm.training.distributed import connect, launch, launched, started_again
from tinyldm.training.flops import Networks
from tinyldm.training.latents import Here, prepare_data
from tinyldm.training.learner import Learner
from tinyldm.training.log import Log
from tinyldm.training.loop import (RolledBack, attempt, make_schedule, mean_rate, out_of_memory, passed_over, refresh_report, resumed_from,
                                   write_log)
from tinyldm.training.run import Clock, Interrupted, Lasting, Pace, Progress, Signals, date, generator, memory_gb, write_picture
from tinyldm.training.schedule import Revision
from tinyldm.training.setup import at_stage, build_networks, fixed_prompts, make_loader, objective, process_options, refuse_early
from tinyldm.training.spikes import RECENT, Course
from tinyldm.training.track import Tracker
from tinyldm.training.validation import Validation
from tinyldm.vendor_loaders.load import Model

MEASURED = 200                                               # steps, after which plan and measurement are compared
ROLLBACKS = 10                                               # in one process, after which it is not the data


# ---------------------------------------------------------------- stage 2


class Trainer:
    """Stage 2: the network learns to denoise latents, at one picture size after another."""

    def __init__(self, config: Config, here: Here, vae: AutoencoderKL, caches: list[Cache], last: Path | None, window: int):
        """last: the checkpoint to go on from. window: so many batches have been passed over to get here (--rollback)."""
        torch.manual_seed(config.seed + 1)
        self.config, self.here, self.caches, self.stages = config, here, caches, stages(config)
        net, text, tokenizer = build_networks(config, vae, caches[0].all_captions(), last)
        net, text = net.to(here.device), text.to(here.device)
        peak = peak_flops(config, here.device)
        self.peak = peak and peak * here.world.size
        counted = peak or config.stages                                             # which takes a second
        self.costs = [useful_flops(stage, Networks(net, text, vae)) for stage in self.stages] if counted else [1]
        self.learner = Learner(config, net, text, here.world, here.device)
        self.data = [cache.digest for cache in caches]
        state = self.learner.load(last) if last else {}
        if last and state["data"] != self.data:
            raise ValueError(f"{', '.join(str(cache.folder) for cache in caches)} has changed since {last}: put back the latents it "
                             "began with, or start another run with --out")
        self.step, self.place, self.window = state.get("step", 0), state.get("stage_number", 0), max(window, state.get("window", 0))
        shares = [float(share) for share in config.stages.values()] or [1.0]
        self.shares = [share / sum(shares) for share in shares]
        here.clock.at_least((state.get("schedule") or {}).get("running", 0.0))
        running, now = self.time()
        self.schedule = make_schedule(config, state.get("schedule"), running, now)
        self.model = Model(net, vae, text, tokenizer, make_process(config.process, **process_options(config)), config.prediction, {}, {})
        self.empty = torch.from_numpy(tokenizer.encode([""]))[0]
        self.tracker = Tracker(config.track if here.world.main else "", here.run, dataclasses.asdict(config), self.step)
        self.log = Log(here.run / "log.jsonl" if here.world.main else None, "step", self.step, self.tracker.row)
        self.writer, self.pace = checkpoint.Writer(here.run, config.keep_last, config.keep_every), Pace()
        self.note_plan(self.schedule.resume(self.step, running, now) if last else None, running, now)
        if window > state.get("window", 0):
            self.log.write(stage="step", step=self.step, event="rollback", window=window,
                           text=f"back to step {self.step}: {window:,} batches passed over so far")

    def time(self) -> list[float]:
        """Running time and the time of day, the latest that any process has: the same for all."""
        return self.here.world.agree(self.here.clock.running(), time.time())

    def train(self) -> None:
        """All stages, to the end of the schedule."""
        self.bar = Progress(self.config.network, self.step, self.schedule.total, self.config.batch_size, self.here.device, self.here.world.main)
        self.bar.peak, begun, first = self.peak, self.step, self.place
        try:
            for self.place in range(first, len(self.stages)):
                running, now = self.time()
                if not (self.schedule.done(self.step, running, now) or self.stage_over(running, now)):
                    stage, self.bar.flops = self.stages[self.place], self.costs[self.place]
                    if self.place > first:
                        text, self.learner.course = f"from here on {stage.resolution} px", Course()
                        self.log.write(stage="step", step=self.step + 1, event="stage", resolution=stage.resolution, text=text)
                    self.train_stage(stage, self.caches[self.place], begun)
        finally:                                                                    # also the checkpoint that is under way
            self.bar.close(), self.writer.close(), self.tracker.close()

    def train_stage(self, config: Config, data: Cache, begun: int) -> None:
        """One picture size, until its share of the training is over."""
        learner, world, device, log = self.learner, self.here.world, self.here.device, self.log
        self.model = at_stage(self.model, config)
        loader = make_loader(config, data, self.model.tokenizer, device, world)
        most = config.batch_size // world.size                                      # micro-batches, each of one sample or more
        parts = min(-(-config.grad_accum // world.size), most)
        goal, net = objective(config, self.model.process), self.model.net
        self.pace.restart()
        if config.compile if config.compile is not None else device.type == "cuda" and not config.fsdp:
            torch.compiler.reset()                                                  # or another size is taken for any size, here and below
            net = torch.compile(net)

        def losses_of(x0: Tensor, eps: Tensor, t: Tensor, mixed: Tensor, tokens: Tensor) -> Tensor:
            with autocast(device, config.dtype):
                cond = encode_tokens(self.model.text, tokens, device, config.mask_padding, cut=True)
                return sample_losses(net, x0, eps, t, cond, self.model.process, mixed=mixed, **goal)      # [micro-batch]

        validate = Validation(loader.cache, loader.held_out, loader.fingerprint, config.seed, -(-most // parts), device, losses_of)
        for _, x0, tokens in loader.run(self.step + self.window):                   # x0 [b, c, h, w]: this process's share
            batch = self.noised(config, x0, tokens, loader.part)
            while True:
                failed = self.accumulate(losses_of, batch, parts)
                running, now, failed, signal = world.agree(self.here.clock.running(), time.time(), failed, self.here.signals.received)
                if not failed:
                    break
                parts = self.smaller(parts, most)
            factor, measured = self.schedule.factor(self.step, running, now), (self.step + 1) % config.log_every == 0
            loss, moved = learner.step(self.step + 1, factor, measured)
            self.step += 1
            self.pace.step()
            self.bar.update()
            self.writer.look()
            self.watch(loss)
            finished = self.schedule.done(self.step, running, now)
            if measured:
                write_log(log, "step", self.step, learner.meter, self.bar, factor, config.lr * factor, self.ends(running, now),
                          **{"update_ratio": moved} if moved is not None else {}, running=running)
            if self.step - begun == MEASURED:
                self.tell(config, running, now)
            self.duties(config, validate, finished, bool(signal), running, now)
            if signal and not finished:
                self.here.signals.received = int(signal)                        # whoever got it
                raise Interrupted
            if finished or self.stage_over(running, now):
                return

    def noised(self, config: Config, x0: Tensor, tokens: Tensor, share: slice) -> list[Tensor]:
        """Noise, times and dropped captions, drawn for the whole global batch by one stream of random numbers, of which every
        process takes its share -> x0, eps, t, x_t's noise, token ids."""
        rng = generator(config.seed, 2, self.step + self.window)
        noise = make_noise((config.batch_size, *x0.shape[1:]), rng, config.noise_offset, config.input_perturbation)
        t = sample_t(config.times, config.batch_size, rng, config.times_mean, config.times_scale, self.model.process, config.stratified_times)
        dropped = torch.rand(config.batch_size, generator=rng) < config.caption_dropout
        tokens = torch.where(dropped[share, None], self.empty, tokens)              # [b, context_length]
        return [part.to(self.here.device, non_blocking=True) for part in (x0, noise.eps[share], t[share], noise.mixed[share])] + [tokens]

    def accumulate(self, losses_of, batch: list[Tensor], parts: int) -> bool:
        """Gradients of a batch, in so many micro-batches. True, and none, where the memory does not suffice."""
        try:
            for micro in zip(*(part.tensor_split(parts) for part in batch)):
                losses = losses_of(*micro)
                (losses.sum() / self.config.batch_size).backward()                  # a mean over the global batch, however it is split
                self.learner.meter.add(losses, 1 / self.config.batch_size, micro[2])
            return False
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or self.config.fsdp:                        # which leaves the others waiting
                raise
            return True

    def smaller(self, parts: int, most: int) -> int:
        """Twice as many micro-batches of half the size, after one did not fit: the global batch stays."""
        self.learner.forget()
        if self.here.device.type == "cuda":
            torch.cuda.empty_cache(), torch.compiler.reset()
        if parts == most:
            raise ValueError(f"out of memory with a single picture of {self.stages[self.place].resolution} px: use a smaller network, "
                             "--grad-checkpointing, or --stages of fewer pixels")
        parts = min(2 * parts, most)
        text = f"out of memory: micro-batch {-(-most // parts)}, accumulation {parts * self.here.world.size}"
        print(f"\n{text}", flush=True)
        self.log.write(stage="step", step=self.step + 1, event="memory", text=text)
        return parts

    def watch(self, loss: float | None) -> None:
        """Steps that were left out and spikes are noted; a loss that has left its course rolls back, where that is wanted."""
        if loss is None:
            text = self.learner.meter.skip(self.step - 1 + self.window, self.config.seed)
            return self.log.write(stage="step", step=self.step, event="skipped", text=text)
        if text := self.learner.course.see(self.step, loss):
            self.log.write(stage="step", step=self.step, event="spike", text=text)
        if self.config.rollback and self.learner.course.lost:
            raise RolledBack(self.step - RECENT, self.step, self.window)

    def duties(self, config: Config, validate: Validation, finished: bool, stopping: bool, running: float, now: float) -> None:
        """What is due now and then: validation, pictures, a revised plan, and then the checkpoint that says they are done."""
        step, ema = self.step, self.learner.ema
        tried = attempt if not config.fsdp else lambda what, work: work()           # sharded networks fail together
        if validate.whole and (finished or config.val_every and step % config.val_every == 0):
            with self.pace.aside("validation"):
                tried("validation", lambda: self.log.write(stage="step", step=step, **validate.both(ema)))
        if finished or config.sample_every and step % config.sample_every == 0:
            with self.pace.aside("the sample grid"):
                tried("the sample grid", lambda: self.sample_grid(config))
        if finished or stopping or step % config.save_every == 0:
            with self.pace.aside("the checkpoint"):
                self.note_plan(self.replan(running, now), running, now)
                self.log.flush()
                self.learner.save(self.writer, self.model, step, {
                    "finished": finished, "data": self.data, "stage_number": self.place, "window": self.window,
                    "schedule": None if self.schedule.max_steps else self.schedule.state()})
                if finished:
                    self.writer.wait()
                if self.here.world.main:
                    refresh_report(self.here.run)

    # ---------------------------------------------------------------- the plan

    def stage_over(self, running: float, now: float) -> bool:
        """Whether the stage has had its share; the last one goes on to the end."""
        end = sum(self.shares[:self.place + 1]) - 1e-9
        return self.place + 1 < len(self.stages) and self.schedule.progress(self.step, running, now) >= end

    def rate(self, running: float, now: float) -> float:
        """Seconds per step from here to the end, on average over the stages to come; 0: not known yet."""
        if not self.pace.times:
            return 0.0
        return mean_rate(self.pace.rate, self.schedule.progress(self.step, running, now), self.place, self.shares, self.costs)

    def replan(self, running: float, now: float) -> Revision | None:
        """With a budget: what the measured speed makes of it."""
        rate, ending = self.here.world.agree(self.rate(running, now), sum(self.pace.costs.values()))
        revision = self.schedule.revise(self.step, running, rate, ending, now)
        self.bar.plan(self.schedule.total)
        return revision

    def note_plan(self, revision: Revision | None, running: float, now: float) -> None:
        if revision:
            self.log.write(stage="step", step=self.step, event="plan", total_steps=revision.new, decay_from=self.schedule.decay_from,
                           finish=date(self.schedule.left(running, now)), text=f"{revision.new:,} steps planned ({revision.why})")

    def ends(self, running: float, now: float) -> str:
        if not self.schedule.max_steps:
            return date(self.schedule.left(running, now))
        return date((self.schedule.total - self.step) * self.rate(running, now))

    def tell(self, config: Config, running: float, now: float) -> None:
        """Plan and measurement, side by side, once there is something to compare."""
        if not self.schedule.total:
            self.note_plan(self.replan(running, now), running, now)
        seconds, memory = self.pace.seconds, memory_gb(self.here.device)
        speed = config.batch_size / seconds
        attempt("the comparison with the plan", lambda: print("\n" + compare(config, Measured(
            seconds, speed, speed * self.bar.flops / self.bar.peak if self.bar.peak else None, memory or None, self.schedule.total,
            self.ends(running, now)), self.config, MEASURED), flush=True))

    # ---------------------------------------------------------------- pictures

    def sample_grid(self, config: Config) -> None:
        """A picture of fixed prompts from fixed seeds: comparable between steps and between runs."""
        model, repeated = self.model, [prompt for prompt in fixed_prompts(config, self.caches[0]) for _ in range(2)]
        model.net.eval(), model.text.eval()
        try:
            with self.learner.ema.applied(), autocast(self.here.device, config.dtype):
                images = draw(model, repeated, range(len(repeated)), settings(model))
        finally:
            model.net.train(), model.text.train()
        if self.here.world.main:
            file = self.here.run / "samples" / f"step-{self.step:06d}.png"
            write_picture(file, tile(images, columns=8))
            self.tracker.picture("samples", file, self.step)


# ---------------------------------------------------------------- the run


def prepare_run(config: Config) -> None:
    """The run folder, new or resumed, with the resolved config in it."""
    run = Path(config.out)
    if config.resume == "no" and ((run / "vae").exists() or checkpoint.names(run)):
        raise ValueError(f"{run} holds a run already: continue it with --resume auto, or name another folder with --out")
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.lock(run)
    if config.resume == "no":
        (run / "running.json").unlink(missing_ok=True)                          # of one that came to nothing
    write_file(run / "config.json", json.dumps(dataclasses.asdict(config) | {"resume": "no"}, indent=1))
    write_file(run / "launch", launch())
    print(f"run folder {run}, configuration in {run / 'config.json'}")


def train_all(config: Config, here: Here) -> None:
    """Everything, from the newest checkpoint on. With --rollback it may begin again at an older one."""
    last = resumed_from(config, here.run) if here.world.main else None
    last, window = here.world.told([str(last or ""), passed_over(here.run, last)])
    last = Path(last) if last else None
    vae, caches = prepare_data(config, here, last)
    last = last if last and last.name.startswith("step") else None
    for _ in range(ROLLBACKS):
        trainer = Trainer(config, here, vae, caches, last, window)
        try:
            with here.world.watch():
                return trainer.train()
        except RolledBack as error:
            back = error.with_traceback(None)                                   # which would keep the weights
        del trainer
        torch.compiler.reset()
        last, window = here.world.told(back.retreat(here.run) if here.world.main else None)
        last = Path(last)
    raise ValueError(f"{ROLLBACKS} times the loss left its course: this is not the data. Lower --lr and --muon-lr, or lengthen --warmup-steps")


def main() -> None:
    config = CONFIG
    if ARGS.dry_run:
        return print_plan(config)
    rank, processes = launched()
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    if rank:
        sys.stdout = open(os.devnull, "w")                                      # the main process speaks for all
    device = pick_device(config.device)
    if device.type == "cpu":
        prefer_plain_attention()
    if config.deterministic:
        deterministic()
    run = Path(config.out)
    if started_again(run):                                                      # by torchrun, after one process has died
        config = parse([*sys.argv[1:], "--resume", "auto"], __doc__, FLAGS)[0]
    config = refuse_early(config)
    if rank == 0:
        prepare_run(config)
    clock, world = Clock(run if rank == 0 else None, BEGUN), connect(device)
    signals = Signals()
    try:
        train_all(config, Here(run, device, world, signals, clock))
    except Interrupted:
        start = "python" if processes == 1 else "torchrun (as before)"
        print(f"saved; continue with: {start} train.py --out {run} --resume auto")
        sys.exit(128 + signals.received)
    finally:
        clock.close()
        world.close()
    print(f"done: look at {run / 'report.html'}, and draw what you like: python sample.py \"a red fox\" --model {run}")


if __name__ == "__main__":
    guard(main)
