"""Estimates how long the parts of a training step take on a GPU, other than the network: what is left is the network's.

Every figure is an estimate from FLOPs and bytes; benchmarks/gpu.py measures the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Size

from tinyldm.model import muon_matrices
from tinyldm.planning.flops import size
from tinyldm.planning.phase import PlannedPhase

BANDWIDTH = 1.5e12          # bytes/s, estimate: what pointwise operations reach of the RTX 5090's 1.79e12
# Bytes that are read and written per parameter and micro-batch: the cast of a weight (4 + 2), and the gradient's, which is added in
# float32 (2 + 4, 4 + 2): estimate.
PER_MICRO_BATCH = 18
PER_STEP = 40               # the same per step: norm, clipping, momentum, weights, averages (estimate)
ITERATIONS = 5              # steps of Muon's Newton-Schulz iteration (orthogonalise in training/optim.py)


def step_seconds(phase: PlannedPhase) -> dict[str, float]:
    """Seconds per step of the second stage, by part: text encoder, optimizers, and work on weights in every micro-batch."""
    config, speed = phase.config, phase.config.plan.utilisation * phase.config.plan.gpu_tflops * 1e12
    weights = size(*phase.trained.values())
    captions = phase.batch
    if "text" not in phase.trained:                             # a frozen one encodes equal captions once, such as the dropped ones
        captions *= 1 - config.objective.caption_dropout
    matrices = muon_matrices(phase.trained) if config.optimisation.optimizer == "muon" else ()
    shapes = [p.shape for part, module in phase.trained.items() for name, p in module.named_parameters() if f"{part}.{name}" in matrices]
    return {"text encoder": captions * phase.flops["text"] / speed,
            "optimizers, averages": muon_flops(shapes) / speed + PER_STEP * weights / BANDWIDTH,
            "casts, gradient sums": config.optimisation.grad_accum * PER_MICRO_BATCH * weights / BANDWIDTH}


def muon_flops(shapes: Iterable[Size]) -> int:
    """FLOPs of orthogonalising weights of these shapes as matrices (training/optim.py). Near-square ones [m, n] take part in three
    products per iteration, x x^T, its square, and their sum times x; long ones in one at the start and one at the end, the others
    are of size m."""
    total = 0
    for shape in shapes:
        m, n = sorted((shape[0], math.prod(shape[1:])))
        total += ITERATIONS * (4 * m * m * n + 2 * m**3) if n < 2 * m else 4 * m * m * n + (8 * ITERATIONS - 6) * m**3
    return total
