"""Times evaluation: statistics of 50,000 x 2048 features in one pass, the Fréchet distance, and Inception's features.

    python benchmarks/evaluation.py [--pictures 32]

Wall time, and beside it the CPU time of all threads, which says more on a machine that others use. Memory is the growth of this
process's peak. The Fréchet distance is compared with scipy.linalg.sqrtm, which pytorch-fid uses; Inception has random weights, and is
compared with torch-fidelity's where that is installed, the two taking turns in one process (medians).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch

from tinyldm.device import memory_gb
from tinyldm.evaluation.distances import Frechet
from tinyldm.evaluation.statistics import FeatureSet, Gatherer
from tinyldm.models.inception import FIDInception

COUNT, DIMENSIONS, BATCH = 50_000, 2048, 50
CPU = torch.device("cpu")


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, wall seconds, CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def gather(seed: int) -> tuple[FeatureSet, float, float]:
    """Features that come in batches, and the seconds that their statistics take without the time of making them."""
    rng, gatherer, wall, cpu = np.random.default_rng(seed), Gatherer("inception", "none"), 0.0, 0.0
    mix = (rng.standard_normal((DIMENSIONS, DIMENSIONS)) * np.exp(-np.arange(DIMENSIONS) / 300)[:, None]).astype(np.float32)
    for _ in range(COUNT // BATCH):
        rows = np.abs(rng.standard_normal((BATCH, DIMENSIONS), dtype=np.float32) @ mix) / 30
        keys = rng.integers(0, 2**64, BATCH, dtype=np.uint64)
        _, more_wall, more_cpu = timed(lambda: gatherer.add(rows, keys))
        wall, cpu = wall + more_wall, cpu + more_cpu
    found, more_wall, more_cpu = timed(gatherer.finish)
    return found, wall + more_wall, cpu + more_cpu


def features_per_second(pictures: int, rounds: int = 3) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (pictures, 3, 256, 256), dtype=np.uint8))
    networks = {"ours": FIDInception().eval()}
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except ImportError as error:
        print(f"without torch-fidelity ({error})")
    else:
        fidelity.load_state_dict_from_url = lambda *args, **options: {}                 # random weights will do, without a download
        fidelity.FeatureExtractorInceptionV3.load_state_dict = lambda self, weights: None
        networks["torch-fidelity"] = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval()
    seconds = {name: [] for name in networks}
    with torch.no_grad():
        for network in networks.values():
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.ones_like(tensor) if "var" in name else torch.randn_like(tensor) / 30)
        for _ in range(rounds + 1):
            for name, network in networks.items():
                seconds[name].append(timed(lambda: network(images))[1:])
    for name, found in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*found[1:]))           # the first round warms up
        print(f"Inception, {name:16}{pictures / wall:8.1f} pictures per second, {1000 * cpu / pictures:6.0f} ms of CPU each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--skip-sqrtm", action="store_true", help="leave out scipy.linalg.sqrtm, which takes a minute")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    before = memory_gb(CPU)
    (one, wall, cpu), grown = gather(0), memory_gb(CPU) - before
    print(f"statistics of {COUNT:,} x {DIMENSIONS}: {wall:.1f} s, CPU {cpu:.1f} s, memory + {1000 * grown:.0f} MB")
    other, _, _ = gather(1)
    distance, wall, cpu = timed(lambda: Frechet(one.gaussian).to(other.gaussian))
    print(f"Fréchet distance: {wall:.1f} s, CPU {cpu:.1f} s: {distance:.9g}")
    if not args.skip_sqrtm:
        a, b = one.gaussian, other.gaussian
        root, wall, cpu = timed(lambda: scipy.linalg.sqrtm(a.cov @ b.cov))
        theirs = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * np.trace(root).real
        print(f"... by scipy.linalg.sqrtm: {wall:.1f} s, CPU {cpu:.1f} s: {theirs:.9g}, "
              f"{abs(theirs - distance) / theirs:.1e} relative apart")
    features_per_second(args.pictures)


if __name__ == "__main__":
    main()
