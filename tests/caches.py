"""Small caches of latents whose values encode the number of their sample."""

import json

import numpy as np
from helpers import small_text

from tinyldm.data.cache import Cache, ShardWriter, write_index, write_tokens

SQUARE, WIDE = (4, 4), (2, 6)
TOKENIZER = small_text()[0]
IN_ORDER = [2, 0, 1, 3, 4, 5, 6, 7]     # of mixed(): the sample written with number i is read as IN_ORDER.index(i)


def latents(first, count, size=SQUARE, views=1, parts=1):
    """Sample i, view v, part p has the value 10 i + v + p / 2, plus a small ramp along the columns."""
    out = np.zeros((count, views, parts, 3, *size), np.float16)
    out += (10 * np.arange(first, first + count)).reshape(-1, 1, 1, 1, 1, 1)
    out += np.arange(views).reshape(1, -1, 1, 1, 1, 1) + np.arange(parts).reshape(1, 1, -1, 1, 1, 1) / 2
    return out + np.arange(size[1], dtype=np.float16) / 16


def caption(i, kind=0):
    return [(kind, f"a red square {i} é")]


def shard(folder, name, pieces, **shape):
    """Write a shard. pieces: (size, first number, captions of each sample), in the order in which they are written."""
    folder = folder / "shards" / name
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for size, first, captions in pieces:
        writer.add(latents(first, len(captions), size, **shape), captions)
    facts = writer.close()
    kept = sum(group["count"] for group in facts["groups"])
    facts |= {"name": name, "url": f"x/{name}.tar", "stamp": "s", "read": kept + 1, "kept": kept, "skipped": {"broken": 1},
              "filtered": {}, "stats": {"mean": [0.0]}}
    (folder / "shard.json").write_text(json.dumps(facts))
    return folder


def mixed(folder):
    """A cache of two sources and two sizes, with one to three captions per sample, numbered as IN_ORDER says."""
    pieces = [(SQUARE, 0, [caption(0), caption(1)]), (WIDE, 2, [caption(2)]), (SQUARE, 3, [caption(3)])]
    shard(folder, "a", pieces, views=2, parts=2)
    shard(folder, "b", [(SQUARE, 4, [caption(4) + caption(40, 1), caption(5, 1)])], views=2, parts=2)
    shard(folder, "none", [])
    shard(folder, "c", [(WIDE, 6, [caption(6), caption(7) + caption(70) + caption(700, 1)])], views=2, parts=2)
    write_index(folder, {"size": 64}, [{"spec": "one", "shards": ["a", "b"]}, {"spec": "two", "shards": ["none", "c"]}])
    return Cache(folder)


def many(folder, shards, rows=3):
    """A cache of one source with many small shards, and its tokens."""
    for i in range(shards):
        shard(folder, f"{i:04d}", [(SQUARE, i * rows, [caption(i * rows + j) for j in range(rows)])])
    write_index(folder, {}, [{"spec": "s", "shards": [f"{i:04d}" for i in range(shards)]}])
    write_tokens(folder, TOKENIZER)
