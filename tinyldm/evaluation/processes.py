"""An evaluation by several processes, as torchrun starts them: each computes the features of its part of the pictures, and what metrics
need of all features is put together, so that the numbers are those of one process.

The arithmetic after that is the first process's alone. A process that fails must not leave the others waiting for it, and a metric that
fails is not the end of the evaluation. So before anything is put together all processes say whether they have come so far (`together`),
and after each metric they wait for each other (`finish`), where one that has failed tells those who are not there yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tinyldm.evaluation.base import NotFirst
from tinyldm.evaluation.statistics import Classes, Gatherer, Moments, Sample
from tinyldm.training.distributed import World



def together(world: World, work: Callable[[], Any]) -> Any:
    """work() in every process -> its result. Where it fails in one of them, all others get an error as well: the first one a ValueError,
    the others NotFirst, which nobody prints."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    failed, _ = world.all_reduce_max(error is not None, 1)
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"another of the {world.size} processes has failed: its own message says why") if world.main else NotFirst
    return result


def finish(world: World, failed: bool) -> None:
    """The end of a metric. A process that is in together() meanwhile is told that another has failed, and comes here then."""
    while world.all_reduce_max(failed, 0)[1]:
        pass


# ---------------------------------------------------------------- sums of what the processes have


def merge(gatherer: Gatherer, world: World) -> Gatherer:
    """The gatherer of one process -> that of the rows of all, in all of them."""
    if world.size == 1:
        return gatherer
    moments, classes = gatherer.moments, gatherer.classes
    dimensions, outcomes = map(int, world.all_reduce_max(len(moments.mean) if moments else 0, classes.sums.shape[1] if classes else 0))
    whole = Gatherer(gatherer.tower, gatherer.resize, gatherer.most)
    if dimensions:                                              # 0: there are no pictures at all
        whole.moments = merge_moments(moments or Moments(dimensions), world)
        whole.sample = merge_samples(gatherer.sample if moments else Sample(dimensions, gatherer.most), world)
    if outcomes:
        whole.classes, own = Classes(outcomes), classes or Classes(outcomes)
        whole.classes.sums, whole.classes.entropies, whole.classes.counts = add(world, own.sums, own.entropies, own.counts)
    return whole


def merge_moments(moments: Moments, world: World) -> Moments:
    """Mean and scatter of the rows of all processes. The scatter of one has its own mean as its centre; it is moved to the common one
    (Chan, Golub, LeVeque 1979, as in Moments)."""
    moments.join()
    if world.size == 1:
        return moments
    whole = Moments(len(moments.mean))
    count, total = add(world, np.array([float(moments.count)]), moments.count * moments.mean)
    whole.count = int(count[0])
    whole.mean = total / max(whole.count, 1)
    away = moments.mean - whole.mean
    whole.scatter = np.asfortranarray(*add(world, np.triu(moments.scatter) + moments.count * np.triu(np.outer(away, away))))
    return whole


def merge_samples(sample: Sample, world: World) -> Sample:
    """The rows with the smallest keys of all. Keys travel first; then every process knows which of its rows are among them."""
    counts = np.zeros(world.size, np.int64)
    counts[world.rank] = sample.count
    counts, = add(world, counts)
    keys = np.zeros((world.size, counts.max()), np.int64)       # other processes' are 0, so that a sum puts them together
    keys[world.rank, :sample.count] = sample.keys[:sample.count].view(np.int64)
    keys, = add(world, keys)
    every = np.concatenate([own[:count] for own, count in zip(keys.view(np.uint64), counts)])
    order = np.argsort(every, kind="stable")[:sample.most]
    first, whole = counts[:world.rank].sum(), Sample(sample.rows.shape[1], sample.most)
    mine = (order >= first) & (order < first + sample.count)
    rows = np.zeros((len(order), sample.rows.shape[1]), np.float32)
    rows[mine] = sample.rows[order[mine] - first]
    whole.count, whole.keys[:len(order)] = len(order), every[order]
    whole.rows[:len(order)], = add(world, rows)
    return whole


def add(world: World, *arrays: np.ndarray) -> list[np.ndarray]:
    """The sums of arrays over all processes, in their own precision."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    world.sum(tensors)
    return [tensor.numpy() for tensor in tensors]
