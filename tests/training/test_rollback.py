"""Back to an older checkpoint, past the batches since."""

import pytest

from tinyldm.training import checkpoint
from tinyldm.training.log import Log
from tinyldm.training.rollback import Diverged, skipped_before


def test_there_must_be_something_to_go_back_to_and_then_what_came_since_is_removed(tmp_path):
    for step in (10, 20, 30):
        checkpoint.write(tmp_path, "step", step, lambda folder: (folder / "weights").write_text("w"), {}, keep=9)
    with pytest.raises(ValueError, match="about step 5, before the first checkpoint"):
        Diverged(5, 25, 0).roll_back(tmp_path)
    assert len(checkpoint.names(tmp_path)) == 3                # nothing was removed for nothing
    last, skipped = Diverged(21, 41, 7).roll_back(tmp_path)
    assert last.endswith("step-000020") and skipped == 7 + 21
    assert [path.name for path in checkpoint.names(tmp_path)] == ["step-000010", "step-000020"]
    log = Log(tmp_path / "log.jsonl", "step", 20)
    log.write(stage="step", step=20, event="rollback", window=skipped)
    first, newest = checkpoint.names(tmp_path)
    assert skipped_before(tmp_path, newest) == 28 and skipped_before(tmp_path, first) == 0 == skipped_before(tmp_path, None)
