"""A network that has learned any curve is a network of rectified flow in other coordinates (Diff2Flow, arXiv:2506.02221).

Divide x = alpha x0 + sigma eps by alpha + sigma, and call s = sigma / (alpha + sigma) the time:

    y = x / (alpha + sigma) = (1 - s) x0 + s eps

is the line. So at (y, s) the network is asked at the t of its own curve where sigma / alpha = s / (1 - s), with x = (alpha + sigma) y. Its
answer is a target p x0 + q eps (prediction.py), which with the line makes two equations, whose solution for the velocity is

    u = eps - x0 = (answer - (p + q) y) / (q (1 - s) - p s).

Nothing is trained, and on the curve nothing is approximated. Two choices remain. Between two entries of a table, where the network was
never asked, the index that it is told is interpolated linearly in s. Beyond the ends of a curve it is asked at the end, s', and x0 (at the
noisy end) is what it guesses there: x0 = y - s' u' = y - s u. So there is an answer at pure noise, s = 1, to which Stable Diffusion's table
does not come (s' = 0.936), and which training then makes right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyldm.diffusion.prediction import to_target
from tinyldm.diffusion.process import AsFlow, Discrete, Level, Process, find_t, input_scale, tables

SMALLEST = 1e-6             # a time at which the velocity still follows from any prediction


def as_flow(net: nn.Module, process: AsFlow) -> nn.Module:
    """The network, changed in place: net(y [b, c, h, w], 1000 s [b], cond) -> velocity [b, c, h, w]. Its weights, their names and its
    config stay what they are. One that has been changed already stays as it is."""
    inner = type(net)
    if hasattr(inner, "learned_as"):
        return net

    def forward(self, y: Tensor, t: Tensor, cond: Any, **options: Any) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        wanted = t.double() / 1000
        s, at = nearest(process.curve, wanted)
        ratio = (s / wanted.clamp(min=1e-12)).clamp(max=1).view(-1, 1, 1, 1)            # s' / s beyond the noisy end, else 1
        p, q = (to_target(process.prediction, at.alpha * 0 + x0, at.alpha * 0 + 1 - x0, at) for x0 in (1, 0))
        scale, s = (at.alpha + at.sigma) / input_scale(at), s.view(-1, 1, 1, 1)
        answer = inner.forward(self, (scale.to(dtype) * y).to(y.dtype), at.t.to(t.dtype), cond, **options)[:, : y.shape[1]].to(dtype)
        return (ratio / (q * (1 - s) - p * s)).to(dtype) * (answer - (p + q).to(dtype) * y)

    net.__class__ = type(inner.__name__, (inner,), {"forward": forward, "learned_as": process})
    return net


def nearest(curve: Process, s: Tensor) -> tuple[Tensor, Level]:
    """The times s [b] that the curve comes to, float64, and its level there, both differentiable by s."""
    if isinstance(curve, Discrete):
        alpha, sigma = tables(curve, s.dtype, s.device)
        entries = sigma / (alpha + sigma)
        s = s.clamp(entries[0], entries[-1])
        i = (torch.searchsorted(entries, s.detach(), right=True) - 1).clamp(0, len(entries) - 2)
        r = ((1 - s) ** 2 + s**2).sqrt()
        one, two = ((value / r).view(-1, 1, 1, 1) for value in (1 - s, s))
        return s, Level(i + (s - entries[i]) / (entries[i + 1] - entries[i]), one, two)
    place = lambda t: (lambda at: (at.sigma / (at.alpha + at.sigma)).flatten())(curve(t))
    low, high = place(torch.tensor([0.0, 1.0], dtype=s.dtype, device=s.device))
    s = s.clamp(low.clamp(min=SMALLEST), high)
    found = find_t(curve, (s / (1 - s).clamp(min=1e-12)).detach())
    below, above = (found - 1e-5).clamp(min=0), found + 1e-5
    slope = (place(above) - place(below)) / (above - below)
    return s, curve(found + (s - place(found)) / slope)         # the last summand is a rounding error; its derivative is dt / ds
