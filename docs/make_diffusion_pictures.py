"""Make the pictures of docs/diffusion.md.

    python docs/make_diffusion_pictures.py runs/tiny       writes docs/curves.png and, from that run, docs/guidance.png

Needs matplotlib, like docs/sampler_errors.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinyldm.cli import need

need("matplotlib")

import matplotlib.pyplot as plt
import numpy as np
import torch

from tinyldm.device import pick_device
from tinyldm.diffusion.process import log_snr, make_process
from tinyldm.folders.load import load_model
from tinyldm.pictures.sheet import INK, captioned
from tinyldm.pipeline import draw, draw_settings
from tinyldm.training.run_folder import find_model

HERE = Path(__file__).parent
CURVES = {
    "scaled_linear (Stable Diffusion)": ("scaled_linear", {}),
    "the same, zero terminal SNR": ("scaled_linear", {"zero_snr": True}),
    "linear (DDPM)": ("linear", {}),
    "cosine": ("cosine", {}),
    "flow": ("flow", {}),
    "flow, shift 3": ("flow", {"shift": 3.0}),
    "ve, over its own length": ("ve", {}),
}
SCALES = (1, 2, 4, 7, 12, 20)
PROMPTS = ("a red fox", "a small white cat in the snow", "a green car on the sand", "a purple fish at sea")


def curves() -> None:
    """Left: each curve in the plane (alpha, sigma), VE divided by the length of that vector. Right: log-SNR against t."""
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    figure, (plane, snr) = plt.subplots(1, 2, figsize=(11, 4.6))
    for i, (label, (name, options)) in enumerate(CURVES.items()):
        level = make_process(name, **options)(t)
        alpha, sigma = (a.expand(len(t), 1, 1, 1).flatten().numpy() for a in (level.alpha, level.sigma))
        length = np.maximum(1, np.hypot(alpha, sigma))
        style = {"color": f"C{i}", "linestyle": ("-", "--", "-.", ":")[i % 4], "linewidth": 1.8}
        plane.plot(alpha / length, sigma / length, **style)
        snr.plot(t, np.clip(log_snr(level).expand(len(t), 1, 1, 1).flatten().numpy(), -14, 14), label=label, **style)
    plane.set(xlabel="alpha, how much of the picture", ylabel="sigma, how much noise", aspect="equal", xlim=(0, 1.05),
              ylim=(0, 1.05), title="x_t = alpha x0 + sigma eps")
    snr.set(xlabel="t", ylabel="log(alpha² / sigma²)", title="where the levels lie")
    snr.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=110)


def guidance(run: str) -> None:
    """Pictures from the same noise at increasing guidance scales, one row per prompt."""
    model = load_model(find_model(run), pick_device())
    images, lines = [], []
    for prompt in PROMPTS:
        for scale in SCALES:
            images.append(draw(model, [prompt], [1], draw_settings(model, cfg=scale))[0])
            lines.append([(f"scale {scale}", INK), (prompt if scale == SCALES[0] else "", INK)])
    captioned(images, lines, columns=len(SCALES), side=128).save(HERE / "guidance.png")


if __name__ == "__main__":
    curves()
    guidance(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")
