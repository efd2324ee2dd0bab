"""Checkpoints when disks change them, processes are killed, writes fail in the background, or two trainers meet."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from helpers import ENVIRONMENT, ROOT

from tinyldm.training import checkpoint


def put(run, step, keep=9):
    """A checkpoint with files at two depths, one of them linked."""
    frozen = run / "frozen"
    frozen.write_text("frozen")

    def fill(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(bytes(range(100)) + step.to_bytes(4, "big"))
        os.link(frozen, folder / "model" / "vae")
        (folder / "optimizer").write_text(f"of step {step}")

    return checkpoint.write(run, "step", step, fill, {"losses": 0.5, "pairs": (1, 2), "by": {3: "three", 20: "twenty"}}, keep)


def three(run) -> list:
    return [put(run, step) for step in (100, 200, 300)]


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def itself(file):
    file.unlink()
    file.symlink_to(file.name)


DAMAGES = {
    "model/weights has changed": lambda folder: flip(folder / "model" / "weights", 50),
    "optimizer has changed": lambda folder: flip(folder / "optimizer", -1),
    "model/weights has 60 bytes instead of 104": lambda folder: os.truncate(folder / "model" / "weights", 60),
    "optimizer has 0 bytes instead of 11": lambda folder: os.truncate(folder / "optimizer", 0),
    "optimizer is missing": lambda folder: (folder / "optimizer").unlink(),
    "model/vae is missing": lambda folder: (folder / "model" / "vae").unlink(),
    "model/vae cannot be read": lambda folder: itself(folder / "model" / "vae"),
    "state.json is missing": lambda folder: (folder / "state.json").unlink(),
    "state.json is damaged": lambda folder: os.truncate(folder / "state.json", 70),
    "state.json is damaged ('utf": lambda folder: (folder / "state.json").write_bytes(b"\xff\x00junk"),
    "it holds no": lambda folder: (folder / "state.json").write_text("3"),
    "state.json has changed": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"losses": 0.5', '"losses": 0.7')),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_named(tmp_path, capsys, fault):
    one, two, last = three(tmp_path)
    assert checkpoint.newest_undamaged(tmp_path) == last and capsys.readouterr().out == ""
    DAMAGES[fault](last)
    assert fault in checkpoint.find_damage(last) and checkpoint.find_damage(two) == ""
    checkpoint.names(tmp_path)                                          # which a person's scripts call: never an error
    assert checkpoint.newest_undamaged(tmp_path) == two
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("checkpoint step-000300 is damaged (") and fault in line
    assert line.endswith("): resuming from step-000200")


def test_every_damaged_one_is_named_and_without_a_whole_one_there_is_none(tmp_path, capsys):
    assert checkpoint.newest_undamaged(tmp_path) is None
    one, two, last = three(tmp_path)
    (two / "optimizer").unlink()
    flip(last / "optimizer", 0)
    assert checkpoint.newest_undamaged(tmp_path) == one
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["step-000300", "step-000200"]
    assert all("resuming from step-000100" in line for line in out)
    (one / "state.json").write_text("[]")
    assert checkpoint.newest_undamaged(tmp_path) is None
    assert capsys.readouterr().out.count("no older checkpoint is undamaged") == 3


def test_no_flipped_bit_of_state_json_changes_what_is_read(tmp_path):
    folder = put(tmp_path, 7)
    state, data = checkpoint.read_state(folder), (folder / "state.json").read_bytes()
    assert state == {"stage": "step", "step": 7, "losses": 0.5, "pairs": [1, 2], "by": {"3": "three", "20": "twenty"}}
    for place in range(0, len(data), 3):
        flip(folder / "state.json", place)
        try:
            assert checkpoint.read_state(folder) == state and not checkpoint.find_damage(folder)      # white space
        except ValueError:
            assert checkpoint.find_damage(folder)
        (folder / "state.json").write_bytes(data)


def test_checkpoints_from_before_there_were_checksums_count_as_whole(tmp_path):
    put(tmp_path, 1)
    old = tmp_path / "checkpoints" / "step-000002"
    old.mkdir()
    (old / "state.json").write_text(json.dumps({"stage": "step", "step": 2, "losses": 1.0}))
    assert checkpoint.newest_undamaged(tmp_path) == old and checkpoint.read_state(old)["losses"] == 1.0
    (old / "state.json").write_text("")
    assert checkpoint.newest_undamaged(tmp_path).name == "step-000001"


def test_a_damaged_one_does_not_take_the_place_of_a_whole_one_that_is_kept(tmp_path):
    one, two, last = three(tmp_path)
    os.truncate(last / "optimizer", 3)
    new = put(tmp_path, 400, keep=2)
    assert checkpoint.names(tmp_path) == [two, new] and not checkpoint.find_damage(two)


def test_old_ones_stay_where_the_new_one_is_not_whole_in_its_place(tmp_path, monkeypatch):
    one, two, last = three(tmp_path)
    real = checkpoint.replace_folder

    def lossy(folder, fill):
        real(folder, fill)
        (folder / "optimizer").unlink()

    monkeypatch.setattr(checkpoint, "replace_folder", lossy)
    with pytest.raises(OSError, match="step-000400 is damaged as soon as it is written .optimizer is missing"):
        put(tmp_path, 400, keep=1)
    assert checkpoint.newest_undamaged(tmp_path) == last and not checkpoint.find_damage(one)


def test_the_same_step_written_again_is_there_all_the_time(tmp_path, monkeypatch):
    one = put(tmp_path, 100)
    twin, real = one.with_name("step-000100~"), os.replace

    def dies(source, target):
        if source.name.startswith(".writing"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, 100)
    assert checkpoint.newest_undamaged(tmp_path) == twin == checkpoint.names(tmp_path)[-1]
    assert checkpoint.read_state(twin)["step"] == 100
    monkeypatch.undo()
    assert checkpoint.names(put(tmp_path, 200, keep=2).parents[1])[0] == twin        # counts as one until there is another
    put(tmp_path, 100)
    shutil.copytree(one, twin)
    assert put(tmp_path, 100) == one and not twin.exists()
    shutil.copytree(one, twin)
    flip(one / "optimizer", 0)
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, 100)
    assert not checkpoint.find_damage(twin)                                   # the damaged one did not take its place


def test_one_that_is_in_use_is_removed_the_next_time(tmp_path, monkeypatch):
    one, two, last = three(tmp_path)
    real = os.replace

    def held(source, target):                                           # as on Windows, where a file in it is open
        if source == one:
            raise PermissionError(13, "in use")
        real(source, target)

    monkeypatch.setattr(os, "replace", held)
    put(tmp_path, 400, keep=2)
    assert [path.name for path in checkpoint.names(tmp_path)] == ["step-000100", "step-000300", "step-000400"]
    assert not checkpoint.find_damage(one)
    monkeypatch.undo()
    put(tmp_path, 500, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000400", "step-000500"]


# ---------------------------------------------------------------- in the background


def test_a_save_does_not_wait_for_its_own_write_but_for_the_one_before(tmp_path):
    go, run = threading.Event(), tmp_path / "checkpoints"
    writer = checkpoint.Writer(tmp_path, keep=2)

    def slowly(folder):
        assert go.wait(30)
        (folder / "x").touch()

    writer.save("step", 1, slowly, {})
    assert not (run / "step-000001").exists()
    threading.Timer(0.1, go.set).start()
    writer.save("step", 2, slowly, {})
    assert (run / "step-000001").exists()
    writer.wait()
    assert (run / "step-000002").exists()
    writer.save("step", 3, slowly, {})
    writer.close()
    assert [path.name for path in checkpoint.names(tmp_path)] == ["step-000002", "step-000003"]
    writer = checkpoint.Writer(tmp_path, keep=1, keep_every=3)
    writer.save("step", 4, slowly, {})
    writer.close()
    assert [path.name for path in checkpoint.names(tmp_path)] == ["step-000003", "step-000004"]


def test_the_state_is_that_of_the_moment_of_saving(tmp_path):
    go, writer, state = threading.Event(), checkpoint.Writer(tmp_path, keep=1), {"losses": 1.0}
    writer.save("step", 1, lambda folder: go.wait(30), state)
    state["losses"] = 2.0
    go.set()
    writer.close()
    assert checkpoint.read_state(checkpoint.newest_undamaged(tmp_path))["losses"] == 1.0


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_an_error_in_the_background_is_raised_once_at_the_next_call(tmp_path, then):
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.save("step", 1, lambda folder: (folder / "x").touch(), {})

    def disk_full(folder):
        raise OSError(28, "No space left on device")

    writer.save("step", 2, disk_full, {})
    arguments = ("step", 3, lambda folder: (folder / "x").touch(), {})
    with pytest.raises(OSError, match="No space left"):
        getattr(writer, then)(*arguments if then == "save" else ())
    if then != "close":
        writer.save(*arguments)
        writer.close()
    assert [path.name for path in checkpoint.names(tmp_path)] == ["step-000001"] + ["step-000003"] * (then != "close")


# ---------------------------------------------------------------- two trainers, and kills

OTHER = """
import sys
from pathlib import Path
from tinyldm.training import checkpoint
for line in sys.stdin:
    try:
        checkpoint.lock(Path(sys.argv[1]))
        print("taken", flush=True)
    except ValueError as error:
        print(error, flush=True)
"""


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run = tmp_path / "run"
    mine = checkpoint.lock(run)
    mine.close()
    checkpoint.lock(run)                                                # kept by nobody here, and yet held
    gc.collect()
    with subprocess.Popen([sys.executable, "-c", OTHER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=ROOT, env=ENVIRONMENT) as other:
        def ask() -> str:
            other.stdin.write("\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        refused = ask()
        assert refused.startswith(f"another process trains in {run}: ") and "--out" in refused
        checkpoint._locks[-1].close()
        assert ask() == "taken"
        with pytest.raises(ValueError, match="another process trains in"):
            checkpoint.lock(run)
        other.kill()                                                    # a lock ends with its process, however that ends
        other.wait()
    checkpoint.lock(run).close()


DRIVER = """
import os, shutil, sys
from pathlib import Path
from tinyldm.training import checkpoint
run, share = Path(sys.argv[1]), int(sys.argv[2])
os.fsync = lambda handle: None                             # for power cuts; a kill loses nothing that was written
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
put = lambda run, step, keep, word: checkpoint.write(run, "step", step, lambda folder: [
    (folder / "part").mkdir(), (folder / "part" / "x").write_text(word), (folder / "y").write_text(word)], {"word": word}, keep)

def write_and_die(at, step, keep, word):
    left = [at]
    def hook(event, args):
        if event in EVENTS:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
    if not (child := os.fork()):
        sys.addaudithook(hook)
        put(run, step, keep, word)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

ends = []
for step, keep, words in ((30, 1, ("20", "new")), (30, 2, ("20", "new")), (20, 1, ("20", "new"))):
    at = 0
    while True:                                            # the last one dies nowhere
        shutil.rmtree(run, ignore_errors=True)
        for old in (10, 20):
            put(run, old, 2, str(old))
        died = write_and_die(at, step, keep, "new")
        newest = checkpoint.newest_undamaged(run)
        word = checkpoint.read_state(newest)["word"]
        assert word in words and (newest / "part" / "x").read_text() == (newest / "y").read_text() == word, (at, newest, word)
        ends.append(word)
        seen = [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")]
        assert all(checkpoint.find_damage(run / "checkpoints" / name) == "" for name in seen), (at, seen)     # or out of sight
        put(run, 40, 2, "40")                              # life goes on, and nothing is left behind
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left[-1] == "step-000040" and len(left) <= 2 and checkpoint.newest_undamaged(run).name == left[-1], (at, left)
        if not died:
            break
        at += share
    assert word == "new"
print(ends.count("20"), ends.count("new"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed often")
@pytest.mark.parametrize("share", [pytest.param(7), pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_one_whole(tmp_path, share):
    words = [sys.executable, "-c", DRIVER, str(tmp_path / "run"), str(share)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stdout
    before, after = map(int, done.stdout.split())
    assert before >= 40 // share and after >= 10 // share + 3
