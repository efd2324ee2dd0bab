"""How well ten pictures teach a model a new subject, by each way of --finetune, and what it forgets: counted by the recogniser.

    python train.py --preset tiny --data toyworld-without-cat --out runs/without-cat
    python benchmarks/finetune.py runs/without-cat                          every row of WAYS, one after the other
    python benchmarks/finetune.py runs/without-cat --ways lora --lora "--rank 8 --max-steps 400"     one, with other settings

The model has never seen the subject that its data leave out. Ten scenes of it, in several colours and on several backgrounds, are
what the model is trained further with. DreamBooth is told that they are a kind of --class, a subject that the model knows.
Pictures are drawn before and after, for the same captions from the same seeds:

    new        captions of the new subject, as that way calls it: is the new subject in the picture?
    class      captions of the class: is it still what it was, or has it become the new subject?
    others     captions of all other subjects

Before, the model reads the new word as it can; for textual inversion, captions have the initial word in its place. A picture counts where
the recogniser reads the right subject (column "subject"), and the right colour and background too (column "all"). OUT/finetune.json
holds the counts, OUT/WAY.png some of the pictures, and OUT/WAY/ is the run. What is there is not trained or measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tinyldm.adapters.embedding import apply_embeddings
from tinyldm.adapters.embedding_files import STANDARD
from tinyldm.adapters.merge import apply_adapters
from tinyldm.data import toyworld
from tinyldm.data.toyworld_source import all_toyworld, left_out
from tinyldm.evaluation.base import Evaluation
from tinyldm.evaluation.prompts import Request, make_requests, reconstruct
from tinyldm.evaluation.recogniser import Recogniser, get_recogniser, score
from tinyldm.files import write_file
from tinyldm.folders.load import load_model
from tinyldm.model import Model
from tinyldm.pictures.sheet import captioned, two_lines
from tinyldm.pipeline import draw_settings, picture_size
from tinyldm.training import checkpoint
from tinyldm.training.run_folder import find_beside, find_model

PICTURES, SHOWN, SCENES_SEED = 10, 9, 1000       # of the new subject; on each row of a sheet; of the scenes, which differs from the data's


class Way(NamedTuple):
    """One way to teach the subject. In its texts {subject} is the new subject, {kind} the class."""

    flags: str                      # of train.py
    words: str                      # what captions call the new subject
    before: str = ""                # what they call it before the training (default: the same)


INSTANCE = '--instance "a sks {kind}"'
PRIOR = '--class "a {kind}"'
WAYS = {
    "lora": Way("--finetune lora --rank 16 --alpha 16 --targets attention text", "{subject}"),
    "dreambooth": Way(f"--finetune dreambooth {INSTANCE}", "sks {kind}"),
    "dreambooth-prior": Way(f"--finetune dreambooth {INSTANCE} {PRIOR}", "sks {kind}"),
    "dreambooth-lora": Way(f"--finetune dreambooth --rank 16 {INSTANCE}", "sks {kind}"),
    "dreambooth-lora-prior": Way(f"--finetune dreambooth --rank 16 {INSTANCE} {PRIOR}", "sks {kind}"),
    "textual-inversion": Way('--finetune textual_inversion --token "<{subject}>" --initial {kind} '
                             '--instance "a <{subject}>|a picture of a <{subject}>|a drawing of a <{subject}>"', "<{subject}>", "{kind}"),
}


class Task(NamedTuple):
    """What is taught to whom, and how it is counted."""

    base: str                       # the run or model folder
    subject: str                    # the new one
    kind: str                       # the class
    count: int                      # captions of each set
    out: Path
    recogniser: Recogniser

    def fill(self, text: str) -> str:
        return text.format(subject=self.subject, kind=self.kind)

    def requests(self, words: str) -> dict[str, list[Request]]:
        """Set -> captions, with these words in place of the new subject."""
        others = toyworld.SUBJECTS.keys() - {self.subject, self.kind}
        sets = {name: make_requests(self.count, "train", 0, subjects) for name, subjects in
                {"new": {self.subject}, "class": {self.kind}, "others": others}.items()}
        called = lambda request: request._replace(prompt=request.prompt.replace(f" {self.subject} ", f" {words} "))
        return sets | {"new": [*map(called, sets["new"])]}


class Result(NamedTuple):
    scores: dict[str, dict]         # set -> recogniser.score
    images: dict[str, np.ndarray]   # set -> uint8 [n, h, w, 3]


# ---------------------------------------------------------------- teaching


def write_pictures(task: Task, size: int) -> Path:
    """Ten scenes of the new subject, with the captions that toyworld gives them -> their folder."""
    folder = task.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for i, drawn in enumerate(new_scenes(task.subject, size)):
        Image.fromarray(drawn.image).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(drawn.caption, encoding="utf-8")
    return folder


def new_scenes(subject: str, size: int, count: int = PICTURES) -> list[toyworld.Sample]:
    """Scenes of a subject, as toyworld mixes them."""
    fitting, i = [], 0
    while len(fitting) < count:
        if toyworld.scene(i, SCENES_SEED).subject == subject:
            fitting.append(toyworld.sample(i, size, SCENES_SEED))
        i += 1
    return fitting


def teach(task: Task, way: str, pictures: Path, more: str) -> tuple[Path, float]:
    """Train by a row of WAYS, unless that run is finished -> its folder, and the seconds that it took."""
    run, begun = task.out / way, time.perf_counter()
    if not (done := checkpoint.names(run)) or not checkpoint.read_state(done[-1]).get("finished"):
        words = ["--model", task.base, "--data", str(pictures), "--out", str(run), "--resume", "auto"]
        subprocess.run([sys.executable, "train.py", *shlex.split(task.fill(WAYS[way].flags)), *words, *shlex.split(more)], check=True)
    return run, time.perf_counter() - begun


def taught(task: Task, run: Path) -> Model:
    """The model of a finished run: the base with what it learned beside it, or a model of its own."""
    learned = find_beside(run)
    model = load_model(find_model(task.base if learned else str(run)))
    if learned and learned.name == STANDARD:
        apply_embeddings(model, [learned])
    elif learned:
        apply_adapters(model, [(learned, 1.0)])
    return model


# ---------------------------------------------------------------- counting


@torch.inference_mode()
def measure(task: Task, model: Model, words: str) -> Result:
    """Draw all sets, and read the pictures."""
    evaluation = Evaluation(model, task.base, draw_settings(model), torch.device("cpu"), task.out)
    asked = task.requests(words)
    images = {name: evaluation.draw([request.prompt for request in requests]).images for name, requests in asked.items()}
    readings = {name: task.recogniser.read(drawn) for name, drawn in images.items()}
    scores = {name: score([request.scene for request in requests], readings[name]) for name, requests in asked.items()}
    return Result(scores, images)


def ceiling(task: Task, model: Model, size: int) -> dict:
    """The recogniser's score of drawn scenes of the new subject after the model's autoencoder: what no training can exceed."""
    scenes = new_scenes(task.subject, size, task.count)
    rebuilt = reconstruct(model, np.stack([drawn.image for drawn in scenes]), torch.device("cpu"), 50)
    return score([drawn.scene for drawn in scenes], task.recogniser.read(rebuilt))


def line(name: str, row: Mapping[str, dict]) -> str:
    """Shares of the subject and of all words, in per cent, with their 95 % intervals (Wilson)."""
    cells = [f"{row[column]['share'] * 100:5.1f} ({row[column]['interval'][0] * 100:.0f} to {row[column]['interval'][1] * 100:.0f})"
             for column in ("subject", "all")]
    return f"{name:36}{row['all']['count']:>9}{cells[0]:>18}{cells[1]:>18}"


def write_sheet(file: Path, task: Task, words: str, before: Result, after: Result) -> None:
    """The first pictures of each set, before and after, each with its caption."""
    images, lines = [], []
    for name, requests in task.requests(words).items():
        for result in (before, after):
            images += [*result.images[name][:SHOWN]]
            lines += [two_lines(f"{'before' if result is before else 'after'}: {request.prompt}") for request in requests[:SHOWN]]
    captioned(images, lines, SHOWN).save(file)


def table(record: Mapping[str, dict]) -> str:
    """All results, one line for each way and set, before and after."""
    lines = [f"{'correct, %':36}{'pictures':>9}{'subject':>18}{'all':>18}", line("new, drawn scenes after the VAE", record["ceiling"])]
    for way, row in record["ways"].items():
        lines += [line(f"{way}: {name}, {when}", row[when][name]) for name in row["before"] for when in ("before", "after")]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a run that was trained on toyworld-without-SUBJECT")
    parser.add_argument("--class", dest="kind", default="fox", help="a subject that the model knows (default: fox)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY", help=f"some of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--count", type=int, default=200, help="captions of each of the three sets")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--all", default="", metavar="FLAGS", help="flags of train.py for every way")
    for way in WAYS:
        parser.add_argument(f"--{way}", default="", metavar="FLAGS", help=f"flags of train.py for {way}")
    args = parser.parse_args(argv)
    if args.kind not in toyworld.SUBJECTS:
        parser.error(f"--class {args.kind}: use one of {', '.join(toyworld.SUBJECTS)}")
    return args


def main() -> None:
    args = parse()
    base = load_model(find_model(args.base))
    data, size = base.defaults.get("data", []), base.defaults.get("resolution") or min(picture_size(base))
    if not all_toyworld(data) or not (subject := left_out(data[0])) or subject == args.kind:
        sys.exit(f"{args.base} was trained on {', '.join(data)}: train one on toyworld-without-SUBJECT, a SUBJECT that is not {args.kind}")
    task = Task(args.base, subject, args.kind, args.count, args.out, get_recogniser())
    pictures, file = write_pictures(task, size), args.out / "finetune.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    facts = {"base": args.base, "subject": subject, "class": args.kind, "count": args.count}
    if {name: record.get(name) for name in facts} != facts:
        record = {**facts, "ceiling": ceiling(task, base, size), "ways": {}}
    before: dict[str, Result] = {}
    for way in args.ways:
        run, seconds = teach(task, way, pictures, f"{args.all} {getattr(args, way.replace('-', '_'))}")
        words, then = task.fill(WAYS[way].words), task.fill(WAYS[way].before or WAYS[way].words)
        if then not in before:
            before[then] = measure(task, base, then)
        after = measure(task, taught(task, run), words)
        write_sheet(args.out / f"{way}.png", task, words, before[then], after)
        record["ways"][way] = {"seconds": round(seconds), "before": before[then].scores, "after": after.scores}
        write_file(file, json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
