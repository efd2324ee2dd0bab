"""evaluate.py on several processes: the numbers of one, and nobody waits for a process that has failed."""

import json
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, ROOT, load_script
from small_models import unet_model
from stand_in_towers import thumbnail_towers, write

from tinyldm.evaluation.base import Evaluation, NotFirst
from tinyldm.evaluation.metrics import METRICS
from tinyldm.evaluation.picture_sets import PictureSet, divided, gather
from tinyldm.evaluation.processes import finish, together
from tinyldm.evaluation.towers import TOWERS, open_tower
from tinyldm.folders.save import save_loaded
from tinyldm.training.distributed import World


class Meeting:
    """Where the processes of a test, which are threads, exchange their values."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size, timeout=20), [None] * size

    def exchange(self, rank: int, value) -> list:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class Threaded(World):
    def __init__(self, rank: int, size: int, meeting: Meeting):
        super().__init__(rank, size)
        self.meeting = meeting

    def all_reduce_max(self, *values):
        return np.max(self.meeting.exchange(self.rank, [float(value) for value in values]), axis=0).tolist()

    def sum(self, tensors, dtype=None):
        found = self.meeting.exchange(self.rank, [tensor.clone() for tensor in tensors])
        assert len({tuple((tensor.shape, tensor.dtype) for tensor in each) for each in found}) == 1
        for tensor, each in zip(tensors, zip(*found)):
            tensor.copy_(sum(each[1:], each[0]))


def at_once(size: int, work) -> list:
    """work(world) in `size` threads -> what each returned or raised."""
    meeting, results = Meeting(size), [None] * size

    def run(rank):
        try:
            results[rank] = work(Threaded(rank, size, meeting))
        except Exception as error:
            results[rank] = error
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    [thread.start() for thread in threads], [thread.join(30) for thread in threads]
    return results


@pytest.mark.parametrize("size", [2, 3, 9])                     # nine processes for seven batches: some have no pictures
@pytest.mark.parametrize("kept", [1000, 20])
def test_features_of_any_number_of_processes_are_those_of_one(monkeypatch, size, kept):
    for name, row in thumbnail_towers().items():
        monkeypatch.setitem(TOWERS, name, row)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 90, (40, 16, 16, 3), dtype=np.uint8) + rng.integers(0, 160, (40, 1, 1, 3), dtype=np.uint8)
    images[39] = images[3]                                      # two with one key, in different processes
    read = lambda world: divided(((images[i:i + 6], [""] * 6) for i in range(0, 40, 6)), world)
    pictures, tower = PictureSet("set", read, {}), open_tower("inception", "here")
    one = gather(tower, pictures, kept)
    for found in at_once(size, lambda world: gather(tower, pictures, kept, world)):
        assert not isinstance(found, Exception), found
        assert found.count == 40 and found.rows.shape == (min(kept, 40), 12)
        np.testing.assert_allclose(found.gaussian.mean, one.gaussian.mean, rtol=1e-12)
        np.testing.assert_allclose(found.gaussian.cov, one.gaussian.cov, rtol=1e-9, atol=1e-12 * np.abs(one.gaussian.cov).max())
        np.testing.assert_allclose(found.rows, one.rows, rtol=1e-5, atol=1e-6)
        assert found.inception_score == pytest.approx(one.inception_score, rel=1e-9)


def test_no_pictures_at_all_are_refused_by_every_process():
    nothing = PictureSet("set", lambda world: iter(()), {})
    stand_in = type("Tower", (), {"name": "inception", "row": TOWERS["inception"]})
    assert {str(error) for error in at_once(2, lambda world: gather(stand_in, nothing, world=world))} == {"no pictures: give two or more"}


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_where_one_process_fails_all_leave_the_metric_and_go_on_to_the_next_together(failing):
    """In the first metric one fails before, between or instead of what is done together; in the second none does."""
    def broken():
        raise OSError("a disk is full")

    def evaluate(world):
        seen = []
        for where in ("before", "between", "inside", "nowhere"):
            mine, failed = world.rank == failing, False
            try:
                if where == "before" and mine:
                    broken()
                together(world, lambda: 1)
                if where == "between" and mine:
                    broken()
                together(world, broken if where == "inside" and mine else lambda: 2)
                seen.append("done")
            except Exception as error:
                seen.append(type(error))
                failed = not isinstance(error, NotFirst)
            finish(world, failed)
        return seen

    for rank, seen in enumerate(at_once(3, evaluate)):
        wanted = OSError if rank == failing else ValueError if rank == 0 else NotFirst
        assert seen == [wanted, wanted, wanted, "done"], (rank, seen)


# ---------------------------------------------------------------- the script itself


def test_what_fails_while_pictures_are_drawn_ends_the_process_and_what_is_not_divided_is_the_first_ones(monkeypatch, tmp_path):
    """The other processes wait for its files, and are ended by torchrun."""
    asked = Evaluation(None, "x", None, torch.device("cpu"), tmp_path, world=World(1, 2))

    def fails(evaluation):
        evaluation.drawing = True
        raise ValueError("no memory is left")

    called = []
    for name, row in (("is", METRICS["is"]._replace(measure=fails)), ("prompts", METRICS["prompts"]._replace(measure=called.append))):
        monkeypatch.setitem(METRICS, name, row)
    evaluate = load_script("evaluate")
    with pytest.raises(SystemExit) as end:
        evaluate.measure("is", asked)
    assert end.value.code == 2
    assert evaluate.measure("prompts", asked) == 0 and not called


WORKER = """
import runpy, sys
sys.path[:0] = [ROOT, ROOT + "/tests"]
from stand_in_towers import Tokens, Words, thumbnail_towers
from tinyldm.evaluation import picture_metrics
from tinyldm.evaluation.towers import TOWERS
TOWERS.update(thumbnail_towers())
picture_metrics.load_text = lambda source, device: Words()
picture_metrics.load_tokenizer = lambda source: Tokens(len)
sys.argv[0] = ROOT + "/evaluate.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def sets(tmp_path):
    return write(tmp_path / "drawn", 40, 1), write(tmp_path / "real", 50, 2)


def processes(tmp_path, size: int, *words) -> list[tuple[int, str, str]]:
    """evaluate.py with stand-ins for towers, in `size` processes -> their exit codes, output and errors."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.replace("ROOT", repr(str(ROOT))))
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)} if size > 1 else {}
    words = [*map(str, words), "--device", "cpu", "--weights", *(f"{tower}=here" for tower in ("inception", "clip", "cmmd"))]
    jobs = [subprocess.Popen([sys.executable, worker, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=ENVIRONMENT | place | ({"RANK": str(rank)} if size > 1 else {})) for rank in range(size)]
    ends = [job.communicate(timeout=100) for job in jobs]
    return [(job.returncode, *end) for job, end in zip(jobs, ends)]


def numbers(value) -> list[float]:
    """All numbers of a record's results, one after the other."""
    if isinstance(value, dict):
        return [number for name, each in value.items() if name != "seconds" for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_one_of_them_speaks(sets, tmp_path):
    """Of pictures that are there, and of pictures that the two draw."""
    (tmp_path / "captions.txt").write_text("a red picture\na blue one\na third caption")
    save_loaded(model := tmp_path / "model", unet_model())
    metrics = "fid,is,kid,precision_recall,cmmd,clip,stats"
    # 12 pictures in twos: a last one alone is rounded otherwise, so a byte may change, and with it the order of resampling.
    cases = {"there": [sets[0], "--batch-size", 7],
             "drawn": [model, "--captions", tmp_path / "captions.txt", "--num", 12, "--batch-size", 2, "--cfg", "1.5,3", "--dtype", "fp32"]}
    for name, words in cases.items():
        found = {}
        for size in (1, 2):
            out = tmp_path / f"{name}-{size}"
            ends = processes(tmp_path, size, *words, "--metric", metrics, "--reference", sets[1], "--out", out)
            assert [code for code, _, _ in ends] == [0] * size, ends
            assert [bool(said) for _, said, _ in ends] == [True, False][:size]
            found[size] = {file.stem: numbers(json.loads(file.read_text())["results"]) for file in sorted(out.glob("*.json"))}
            with np.load(next(out.glob("*.npz"))) as statistics:
                found[size] |= {each: statistics[each].ravel().tolist() for each in ("mu", "sigma", "rows")}
        assert found[1].keys() == found[2].keys() >= {*metrics.split(","), "mu"}
        for metric, values in found[1].items():
            assert values and found[2][metric] == pytest.approx(values, rel=1e-5, abs=1e-7), metric


@pytest.mark.slow
def test_a_metric_that_fails_in_two_processes_does_not_keep_the_others_from_being_measured(sets, tmp_path):
    ends = processes(tmp_path, 2, sets[0], "--metric", "fid,is", "--reference", tmp_path / "nothing", "--out", tmp_path / "out")
    assert [code for code, _, _ in ends] == [2, 2] and "nothing" in ends[0][2]
    assert [file.name for file in (tmp_path / "out").glob("*.json")] == ["is.json"]
