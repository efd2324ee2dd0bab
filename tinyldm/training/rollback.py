"""A loss that has diverged: back to an older checkpoint, past the batches since."""

from __future__ import annotations

from pathlib import Path

from tinyldm.training import checkpoint
from tinyldm.training.log import read


class Diverged(Exception):
    """At `step` the loss has diverged, since about step `since`; `skipped` batches had been skipped before."""

    def __init__(self, since: int, step: int, skipped: int):
        super().__init__(f"the loss diverged at about step {since}")
        self.since, self.step, self.skipped = since, step, skipped

    def roll_back(self, run: Path) -> tuple[str, int]:
        """Remove the checkpoints since -> (the one to go on from, the number of batches skipped by then: those up to this step).
        ValueError where there is none."""
        last = checkpoint.newest_undamaged(run, self.since)
        if last is None or not last.name.startswith("step"):
            raise ValueError(f"{self}, before the first checkpoint: start again with a lower --lr and --muon-lr, or a longer "
                             "--warmup-steps")
        checkpoint.remove_after(run, self.since)
        return str(last), self.skipped + self.step - checkpoint.read_state(last)["step"]


def skipped_before(run: Path, last: Path | None) -> int:
    """The number of batches that a rollback to this checkpoint skipped, if there was one before the process was killed."""
    if last is None or not (run / "log.jsonl").exists():
        return 0
    step = checkpoint.read_state(last)["step"]
    return max((row["window"] for row in read(run / "log.jsonl") if row.get("event") == "rollback" and row["step"] == step), default=0)
