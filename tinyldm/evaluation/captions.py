"""The captions that pictures are drawn from when a model is evaluated: of a file, or of a data set.

Picture i is drawn from caption i and seed `--seed` + i, so the order here is part of a result. That of a file never depends on how many
pictures are drawn. Of a data set as many captions as are wanted are taken evenly, so another number has other captions.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tinyldm.config import make_config
from tinyldm.data.encoding import make_recipe
from tinyldm.data.prepare import usable_pictures
from tinyldm.unicode import check_unicode, read_lines

ENDINGS = (".json", ".jsonl", ".txt")       # of files of captions; anything else is a data source
USUAL = ("prompt", "caption", "text")       # keys of a caption in a line of .jsonl, the one that wins first


class Captions(NamedTuple):
    source: str
    texts: list[str]
    rows: list[dict[str, Any]] = []         # the lines of a .jsonl file

    @property
    def digest(self) -> str:
        """Changes when a caption or the order does."""
        return hashlib.sha256("\n".join(self.texts).encode("utf-8", "replace")).hexdigest()[:12]

    def __getitem__(self, i: int) -> str:
        """Caption i, from the first one on again after the last."""
        return self.texts[i % len(self.texts)]


def read_captions(words: Sequence[str], count: int, seed: int) -> Captions:
    """Captions of one file, or of sources as --data takes them, of which `count` are looked for.

    A .json file holds COCO's annotations or a list of strings, .jsonl one object per line with a "prompt" (or "caption", or "text"), .txt
    one caption per line. ValueError, OSError: it cannot be read, or holds none."""
    file = Path(words[0])
    if len(words) == 1 and file.suffix.lower() in ENDINGS and not file.is_dir():
        return of_file(file)
    config = make_config(data=list(words), seed=seed)
    faults: Counter = Counter()
    items = usable_pictures(make_recipe(config.data), config, count, faults)
    return Captions(" ".join(words), [item.captions[0][1] for item in items])


def of_file(file: Path) -> Captions:
    lines = [line.strip() for line in read_lines(file)]
    rows: list[dict[str, Any]] = []
    try:
        if file.suffix.lower() == ".json":
            texts = of_json(json.loads("\n".join(lines)))
        elif file.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in lines if line]
            texts = [next(row[key] for key in USUAL if key in row) for row in rows]
        else:
            texts = [line for line in lines if line]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{file} is no file of captions ({type(error).__name__} {error}): .json holds COCO's annotations or a list of "
                         'strings, .jsonl lines with a "prompt", .txt one caption per line') from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file} holds {'captions that are no text' if texts else 'no captions'}: .json holds COCO's annotations or a "
                         'list of strings, .jsonl lines with a "prompt", .txt one caption per line')
    return Captions(str(file), [check_unicode(text.strip(), f"{file}: ") for text in texts], rows)


def of_json(content: Any) -> list[str]:
    """A list of strings as it is. Of COCO's annotations the first caption of every picture, in a random order that is always the same,
    then the second ones: COCO-30k is one caption for each of 30,000 pictures."""
    if isinstance(content, list):
        return content
    of_picture = defaultdict(list)
    for row in sorted(content["annotations"], key=lambda row: (row["image_id"], row.get("id", 0))):
        of_picture[row["image_id"]].append(row["caption"])
    pictures = [*of_picture.values()]
    Random("captions").shuffle(pictures)
    return [found[turn] for turn in range(max(map(len, pictures), default=0)) for found in pictures if len(found) > turn]
