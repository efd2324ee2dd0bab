"""Train a latent diffusion model: a VAE first (or a pretrained one), then the network on its latents.

    python train.py --preset tiny                            a whole miniature Stable Diffusion, minutes on a laptop
    python train.py --preset tiny --resume auto              continue an interrupted run, or start it if there is none yet
    python train.py --data "shards/*.tar" --out runs/mine    your own captioned pictures (or a folder of them, or a URL)
    python train.py --cache CACHE --vae-weights V --out ...  latents that prepare.py made before
    python train.py --preset 5090_week --dry-run             the plan of a week on one RTX 5090
    python train.py --preset tiny --budget 20m               use 20 minutes of running time
    python train.py --only vae --vae-preset cifar10 ...      an autoencoder alone, for its own sake
    python train.py --objective contrastive --out ...        a CLIP: for evaluate.py --metric clip, or as --text-weights
    python train.py --finetune lora --model M --data dog/    train a model that exists (or dreambooth, textual_inversion)
    torchrun --nproc-per-node 4 train.py ...                 several GPUs: each takes a part of the same batches

Any setting of tinyldm/config/fields.py is a flag; network fields are KEY=VALUE pairs (--unet widths=64,128,256 depth=2).
Everything is written to runs/PRESET (or --out): report.html, log.jsonl, samples/, checkpoints/. Then: python sample.py "a red fox"
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tinyldm.cli import allow_expandable_segments, begin, best_effort, guard, outlive_terminal
from tinyldm.config import Config, flatten, parse

FLAGS = {"--dry-run": dict(action="store_true", help="print the plan (sizes, FLOPs, memory, hours) and stop")}
STARTED = time.monotonic()                                   # running time counts from here and includes loading torch

if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    begin(), allow_expandable_segments()
    CONFIG, ARGS = parse(sys.argv[1:], __doc__, FLAGS)

import torch

from tinyldm.data.loader import prefetch
from tinyldm.device import autocast, deterministic, fast_convolutions, keep_freed_memory, memory_gb, pick_device, pin
from tinyldm.evaluation.while_training import WhileTraining, check_evaluation
from tinyldm.models.layers import prefer_plain_attention
from tinyldm.objectives import OBJECTIVES, Turn, map_tensors, split, turns_at
from tinyldm.planning.show import Measured, compare, print_plan
from tinyldm.random_streams import generator
from tinyldm.training import checkpoint
from tinyldm.training.clock import Clock
from tinyldm.training.context import RunContext
from tinyldm.training.contrastive_stage import train_clip
from tinyldm.training.distributed import clip, connect, launched, started_again
from tinyldm.training.finetune import prepare_finetune
from tinyldm.training.first_stage import first_stage
from tinyldm.training.frozen import keep_texts
from tinyldm.training.latents import prepare_latents
from tinyldm.training.learner import Learner, Update
from tinyldm.training.log import Log
from tinyldm.training.loss_monitor import RECENT, LossMonitor
from tinyldm.training.micro_batches import MicroBatches
from tinyldm.training.preflight import check_plan, check_run
from tinyldm.training.progress import ProgressBar
from tinyldm.training.rehearsal import rehearse
from tinyldm.training.report import Refresher, refresh_report
from tinyldm.training.rollback import Diverged, skipped_before
from tinyldm.training.run_folder import find_paths, next_command, prepare_run
from tinyldm.training.schedule import Revision
from tinyldm.training.second_stage import LatentStage
from tinyldm.training.signals import Interrupted, Signals
from tinyldm.training.stage import Phase, Stage
from tinyldm.training.timing import Timing
from tinyldm.training.track import Tracker
from tinyldm.training.validation import Validation

COMPARE_AFTER = 200                                          # after this number of steps the plan is compared with measurements
MOST_ROLLBACKS = 10                                          # more in one process are not due to single bad batches: the run ends


class Trainer:
    """Trains the networks of one stage, through all its phases (picture sizes), to the end of its schedule."""

    def __init__(self, stage: Stage, context: RunContext, last: Path | None = None, skipped_batches: int = 0):
        """last: the checkpoint to continue from. skipped_batches: the number of batches that rollbacks have skipped so far."""
        self.stage, self.context, config = stage, context, stage.config
        self.learner = Learner(stage.trained, stage.objective, stage.settings, stage.world, context.device, stage.average, stage.patience)
        state = self.learner.load(last) if last else {}
        self.learner.broadcast_state()
        if last:
            stage.check_resume(state)
        # In state.json the phase is called stage_number, and the number of skipped batches window.
        self.step, self.phase_index = state.get("step", 0), state.get("stage_number", 0)
        self.skipped_batches = max(skipped_batches, state.get("window", 0))
        context.clock.at_least((state.get("schedule") or {}).get("running", 0.0))       # running.json can be lost, or not copied along
        # The first stage of two is trained by the main process alone, in a world of its own.
        self.timing = Timing(context._replace(world=stage.world), stage.settings, state.get("schedule"), stage.fractions, stage.costs)
        self.timing.over = self.learner.stopping.over
        main = stage.world.main
        self.tracker = Tracker(config.run.track if main and stage.reported else "", context.folder, flatten(config), self.step)
        self.log = Log(context.folder / "log.jsonl" if main else None, stage.name, self.step, self.tracker.row)
        self.evaluation = WhileTraining(config, context)
        self.writer = checkpoint.Writer(context.folder, config.run.keep_last, config.run.keep_every)
        self.page = Refresher(context.folder, main, stage.draw_progress)
        self.note_plan(self.timing.resume(self.step) if last else None)
        if skipped_batches > max(state.get("window", 0), skipped_before(context.folder, last)):     # a rollback led here just now
            text = f"back to step {self.step}: {skipped_batches:,} batches skipped so far"
            self.note("rollback", self.step, text, window=skipped_batches)

    @property
    def position(self) -> int:
        """The index of the next global batch. It is larger than the step after a rollback, which skips batches."""
        return self.step + self.skipped_batches

    def train(self) -> None:
        """Run all phases, to the end of the schedule."""
        stage, self.first_step, first = self.stage, self.step, self.phase_index
        total, size = self.timing.schedule.total, stage.settings.batch_size
        self.bar = ProgressBar(stage.title, self.step, total, size, self.context.device, stage.world.main)
        self.bar.peak = stage.peak
        try:
            for index, config in enumerate(stage.phases[first:], first):
                self.phase_index, resolution = index, config.data.resolution
                if self.timing.done(self.step) or self.timing.phase_over(self.step, index):
                    continue
                if index > first:                               # the log's word for a change of the picture size is "stage"
                    self.note("stage", self.step + 1, f"from here on {resolution} px", resolution=resolution)
                    self.learner.monitor = LossMonitor()        # other pictures, another loss
                self.bar.flops = stage.costs[index]
                self.train_phase(stage.begin_phase(index))
        finally:                                                # closing the writer waits for an unfinished checkpoint
            self.bar.close(), self.log.write_out(), self.writer.close(), self.tracker.close()

    def train_phase(self, phase: Phase) -> None:
        """Train at one picture size, until its fraction of the training is over."""
        stage, learner, timing, device, run = self.stage, self.learner, self.timing, self.context.device, phase.config.run
        objective, batch_size = stage.objective, stage.settings.batch_size
        micro_batches = self.cut_batches(phase)
        timing.timer.restart()

        def draw(position: int) -> NamedTuple:                  # for a GPU it runs in a thread, some steps ahead
            samples = phase.samples(position)                   # this process's part of the global batch at this position
            random = generator(stage.stream, run.seed, position)
            batch = objective.draw(samples, random, batch_size, phase.part)             # noise, times, dropped captions
            return map_tensors(batch, pin) if device.type == "cuda" else batch

        # On a CPU all cores compute: the threads of torch's operations there and in another thread would wait for each other.
        depth = 0 if device.type == "cpu" else 4
        with closing(prefetch(draw, self.position, depth=depth)) as batches:
            upcoming = objective.to_device(next(batches), device)
            while not (timing.done(self.step) or timing.phase_over(self.step, self.phase_index)):
                batch, upcoming = upcoming, None
                log_due, updates = (self.step + 1) % run.log_every == 0, {}
                # A turn is one update, with parameters, optimizers and a loss of its own: one here, two with a discriminator.
                for turn in turns_at(objective, self.step, timing.progress(self.step)):     # at least one
                    for attempt in micro_batches.attempts():            # runs once; again, in smaller micro-batches, if memory ran out
                        with attempt:                                   # catches out-of-memory errors only
                            self.accumulate(phase, turn, split(batch, attempt.count))
                        attempt.failed = timing.synchronise(attempt.failed)     # time, signals, memory: the same for all processes
                    if upcoming is None:                                # in the first turn: copied while the device computes
                        upcoming = objective.to_device(next(batches), device)
                    # No DDP wrapper: gradients are summed once, after the last micro-batch, so there is no no_sync() and no
                    # .module. The price: the sum does not overlap with the backward pass, as DDP's buckets do. (Gradients that
                    # --fsdp shards are summed as they arise; all_reduce() leaves them alone.)
                    learner.all_reduce(turn, run.reduce_dtype)          # gradients, and the measured losses
                    norm = clip(learner.weights(turn), stage.settings.grad_clip)        # here the device is waited for
                    update = learner.update(turn, norm, timing.factor(self.step), measure=log_due)      # AdamW, Muon; zero_grad
                    if update.skipped:                                  # the loss or the norm is not finite
                        self.note_skipped(turn)
                    updates[turn.name] = update
                self.step += 1
                learner.average(self.step)                              # EMA
                objective.after_step(self.step)                         # moving targets, for objectives that have them
                self.watch_loss(updates.get(learner.main_turn))
                self.write_log(updates.get(learner.main_turn), log_due)
                self.do_what_is_due(phase)              # validation, pictures, checkpoint; raises Interrupted after a signal

    def accumulate(self, phase: Phase, turn: Turn, micro_batches: list[NamedTuple]) -> None:
        """Forward and backward passes: the gradients of all micro-batches add up in the parameters."""
        objective, batch_size, run = self.stage.objective, self.stage.settings.batch_size, phase.config.run
        progress = self.timing.progress(self.step)              # for terms of the loss that end during the training
        with autocast(self.context.device, run.dtype):
            objective.collect(turn, phase.networks, micro_batches)      # for losses that compare samples with each other
        for micro in micro_batches:
            with autocast(self.context.device, run.dtype):      # a compiled network shares its parameters with the plain one
                losses = objective.losses(turn, phase.networks, micro, progress)                # [micro-batch]
            (losses.sum() / batch_size).backward()              # sums to the mean over the global batch, however it is cut
            self.learner.meters[turn.name].add(losses, 1 / batch_size, getattr(micro, "t", None))

    # ---------------------------------------------------------------- parts of a step that are rare or not about training

    def cut_batches(self, phase: Phase) -> MicroBatches:
        """The number of micro-batches per step. When memory runs out it doubles, so the global batch stays the same."""
        world, sample = self.stage.world, f"a picture of {phase.config.data.resolution} px"
        alone = not (phase.config.run.fsdp or self.stage.objective.compares and world.size > 1)     # others would wait for a repetition
        most = self.stage.settings.batch_size // world.size     # so that every process has at least one sample in each micro-batch

        def start_over(count: int) -> None:
            self.learner.drop_gradients(), self.stage.objective.start_over()
            if self.context.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.compiler.reset()                          # forgets the graphs of larger micro-batches: it keeps only a few
            text = f"out of memory: micro-batch {-(-most // count)}, accumulation {count * world.size}"
            print(f"\n{text}", flush=True)
            self.note("memory", self.step + 1, text)

        return MicroBatches(phase.micro_batches, most, sample, start_over, retry=alone)

    def note(self, event: str, step: int, text: str, **more) -> None:
        """Write an event to the log."""
        self.log.write(stage=self.stage.name, step=step, event=event, **more, text=text)

    def note_skipped(self, turn: Turn) -> None:
        """Log an update that was left out. ValueError after ten in a row: the run is not worth its electricity."""
        text = self.learner.meters[turn.name].count_skipped(self.position, self.stage.config.run.seed)
        self.note("skipped", self.step + 1, text)

    def watch_loss(self, update: Update | None) -> None:
        """After a step: a loss spike is logged; Diverged where --rollback is on and the loss has diverged. Errors of the checkpoint
        that is being written are raised here. update: that of the main turn; None in steps without it."""
        self.timing.timer.step()
        self.bar.update()
        self.writer.raise_failure()
        if update is None or update.skipped:
            return
        if text := self.learner.monitor.observe(self.step, update.loss):
            self.note("spike", self.step, text)
        if self.stage.settings.rollback and self.learner.monitor.diverged:
            raise Diverged(since=self.step - RECENT, step=self.step, skipped=self.skipped_batches)

    def write_log(self, update: Update | None, due: bool) -> None:
        """If due (every --log-every steps), write a row to log.jsonl and show it on the bar. Once, compare the run with its plan."""
        if due:
            factor, row = self.timing.factor(self.step - 1), self.learner.log_row()
            ratio = {"update_ratio": update.ratio} if update and update.ratio is not None else {}
            shown = self.bar.report(row["loss"], self.stage.settings.lr * factor, self.timing.finish(self.step, self.phase_index))
            self.log.write(stage=self.stage.name, step=self.step, lr_factor=factor, **row, **ratio, running=self.timing.running, **shown)
            for text in self.stage.objective.notes():           # a discriminator that has collapsed, for example
                self.note("collapse", self.step, text)
            self.page(self.timing.timer)
        if self.stage.planned and self.step - self.first_step == COMPARE_AFTER:
            self.compare_with_plan()

    def do_what_is_due(self, phase: Phase) -> None:
        """Validation, evaluation and sample grid, and after them the checkpoint, so that a resumed run does not repeat them. Raises
        Interrupted after a signal."""
        step, run, stage, ema, signal = self.step, phase.config.run, self.stage, self.learner.ema, self.timing.signal
        if phase.validation and (self.timing.done(step) or (stage.val_every and step % stage.val_every == 0)):
            self.validate(phase.validation)                     # which may end the training
        finished = self.timing.done(step)
        if stage.draws and run.eval_every and (finished or step % run.eval_every == 0):
            self.optional("the evaluation", lambda: self.evaluation.log(stage, ema, self.log, step))
        if finished or (run.sample_every and step % run.sample_every == 0):
            self.optional("the sample grid", lambda: self.tracker.picture("samples", stage.draw_samples(ema, step), step))
        if (finished and stage.checkpoint_at_end) or signal or step % run.save_every == 0:
            with self.timing.timer.outside_steps("the checkpoint"):
                self.save(finished)
        if signal and not finished:
            self.context.signals.received = signal              # perhaps only another process received it
            raise Interrupted

    def validate(self, validation: Validation) -> None:
        """Measure the loss on held-out samples. With --early-stop training may be over then."""
        row, progress = {}, self.timing.progress(self.step)
        self.optional("validation", lambda: row.update(validation.measure(self.learner.ema, progress)))
        if row:
            self.log.write(stage=self.stage.name, step=self.step, **row)
        if progress >= self.stage.objective.settled and (text := self.learner.validated(self.step, row)):
            self.note("early stop", self.step, text)
            self.timing.over = True

    def optional(self, what: str, work: Callable[[], None]) -> None:
        """Do what the run can do without: a failure is printed. With sharded networks it ends the run, since the other processes
        would wait for this one."""
        with self.timing.timer.outside_steps(what):
            work() if self.stage.config.run.fsdp else best_effort(what, work)

    def save(self, finished: bool) -> None:
        """Write a checkpoint. Before that, revise the plan and flush the log, because a resumed run begins after this point."""
        self.note_plan(self.revise_plan())
        self.log.flush()
        schedule = self.timing.schedule
        self.learner.save(self.writer, self.stage.name, self.step, {
            "finished": finished and self.stage.checkpoint_at_end,              # whether the whole run is finished
            **self.stage.state(), "stage_number": self.phase_index, "window": self.skipped_batches,
            "schedule": None if schedule.max_steps else schedule.state()})      # counted in steps, nothing depends on the clock
        if finished:
            self.writer.wait()
        if self.stage.world.main:
            refresh_report(self.context.folder)

    # ---------------------------------------------------------------- the plan

    def revise_plan(self) -> Revision | None:
        """With a budget: update the planned number of steps from the measured speed. -> what has changed, if anything."""
        revision = self.timing.revise(self.step, self.phase_index)
        self.bar.plan(self.timing.schedule.total)
        return revision

    def note_plan(self, revision: Revision | None) -> None:
        if revision:
            self.note("plan", self.step, f"{revision.new:,} steps planned ({revision.why})", total_steps=revision.new,
                      decay_from=self.timing.schedule.decay_from, finish=self.timing.finish(self.step, self.phase_index))

    def compare_with_plan(self) -> None:
        """Print the plan and the measurements side by side."""
        if not self.timing.schedule.total:
            self.note_plan(self.revise_plan())
        seconds, stage, config = self.timing.timer.seconds, self.stage, self.stage.phases[self.phase_index]
        speed, planned = stage.settings.batch_size / seconds, self.context.device.type == "cuda"    # a plan is made for a GPU
        mfu = speed * self.bar.flops / self.bar.peak if self.bar.peak else None
        measured = Measured(seconds, speed, mfu, memory_gb(self.context.device) or None, self.timing.schedule.total,
                            self.timing.finish(self.step, self.phase_index))
        best_effort("the comparison with the plan",
                    lambda: print("\n" + compare(config, measured, stage.config, COMPARE_AFTER, planned), flush=True))


# ---------------------------------------------------------------- the run


def train_all(config: Config, context: RunContext) -> None:
    """All stages, or --only one, from the newest checkpoint on. With --rollback the second may return to an older checkpoint."""
    world, run = context.world, context.folder
    last = checkpoint.to_resume(config.run, run) if world.main else None
    last, skipped = world.broadcast([str(last or ""), skipped_before(run, last)])
    last = Path(last) if last else None
    begun = last is not None and last.name.startswith("step")

    if OBJECTIVES[config.objective.name].on_pictures:
        return train_clip(config, context, last, train_stage)
    if config.finetune.kind:
        config = prepare_finetune(config, context)
    else:
        first_stage(config, context, last, train_stage)
    if config.run.only:
        return
    keep_texts(config, context, last if begun else None)
    config, micro_batches = rehearse(config, context, last if begun else None)      # one step, before pictures are encoded for hours
    vae, caches = prepare_latents(config, context, begun)
    last = last if begun else None
    for rollbacks in range(MOST_ROLLBACKS + 1):
        trainer = Trainer(LatentStage(config, context, vae, caches, last, micro_batches), context, last, skipped)
        try:
            with world.peer_errors():
                return trainer.train()
        except Diverged as error:
            diverged = error.with_traceback(None)               # the traceback's frames would keep the old trainer's weights alive
        del trainer
        if rollbacks == MOST_ROLLBACKS:
            break
        torch.compiler.reset()
        last, skipped = world.broadcast(diverged.roll_back(run) if world.main else None)
        last = Path(last)
    raise ValueError(f"the loss diverged again after {MOST_ROLLBACKS} rollbacks, so the data are not the cause: lower --lr and "
                     "--muon-lr, or lengthen --warmup-steps")


def train_stage(stage: Stage, context: RunContext, last: Path | None) -> Learner:
    """Train a stage from a checkpoint on, by all processes of its world, to its end -> what was trained."""
    trainer = Trainer(stage, context, last)
    with stage.world.peer_errors():
        trainer.train()
    return trainer.learner


def main() -> None:
    config, (rank, processes) = CONFIG, launched()
    if ARGS.dry_run:
        return print_plan(check_plan(find_paths(config)))
    outlive_terminal()
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")     # the main process prints for all
    device = pick_device(config.run.device)
    if device.type == "cpu":
        prefer_plain_attention(), keep_freed_memory()
    if config.run.deterministic or device.type == "cpu":        # on CPUs it costs no speed
        deterministic()
    else:
        fast_convolutions()
    run = Path(config.run.out)
    if started_again(run):                                      # by torchrun, after one of the processes has died
        config = parse([*sys.argv[1:], "--resume", "auto", "--out", str(run)], __doc__, FLAGS)[0]
    config = check_evaluation(check_run(find_paths(config)))
    if rank == 0:
        prepare_run(config)
    clock, world = Clock(run if rank == 0 else None, STARTED), connect(device)
    signals = Signals()
    try:
        train_all(config, RunContext(run, device, world, signals, clock))
    except Interrupted:
        print(f"saved; continue with: {'python' if processes == 1 else 'torchrun (as before)'} train.py --out {run} --resume yes")
        world.close()
        sys.exit(128 + signals.received)
    finally:
        clock.close()
    world.close()                                               # not after an error: NCCL would wait for processes that have ended
    print(f"done: look at {run / 'report.html'}, and {next_command(config)}")


if __name__ == "__main__":
    guard(main)
