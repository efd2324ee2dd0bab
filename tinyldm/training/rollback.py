"""What happens after a loss has diverged: the run returns to an older checkpoint and skips the batches trained on since then."""

from __future__ import annotations

from pathlib import Path

from tinyldm.training import checkpoint
from tinyldm.training.log import read


class Diverged(Exception):
    """Raised at `step`, when the loss has diverged. It began at about step `since`. skipped: batches skipped so far."""

    def __init__(self, since: int, step: int, skipped: int):
        super().__init__(f"the loss diverged at about step {since}")
        self.since, self.step, self.skipped = since, step, skipped

    def roll_back(self, run: Path) -> tuple[str, int]:
        """Remove the checkpoints after `since`. -> (the checkpoint to continue from, the new number of skipped batches, which now
        includes those between that checkpoint and `step`). ValueError where there is no checkpoint before `since`."""
        last = checkpoint.newest_undamaged(run, self.since)
        if last is None or not last.name.startswith("step"):
            raise ValueError(f"{self}, before the first checkpoint: start again with a lower --lr and --muon-lr, or a longer "
                             "--warmup-steps")
        checkpoint.remove_after(run, self.since)
        return str(last), self.skipped + self.step - checkpoint.read_state(last)["step"]


def skipped_before(run: Path, last: Path | None) -> int:
    """The number of batches to skip from this checkpoint on: from the log, if a rollback to it preceded a kill, else 0."""
    if last is None or not (run / "log.jsonl").exists():
        return 0
    step = checkpoint.read_state(last)["step"]
    return max((row["window"] for row in read(run / "log.jsonl") if row.get("event") == "rollback" and row["step"] == step), default=0)
