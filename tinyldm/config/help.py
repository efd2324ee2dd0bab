"""--help of the scripts that take settings: presets with a line each, settings in groups with their defaults, the fields of the networks.

The fields are read from the sources of the networks, not from the modules, which would load torch: --help answers at once."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

from tinyldm.config.presets import VAE_PRESETS

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {                           # presets, in a line each
    "tiny": "autoencoder, text encoder and U-Net on drawn scenes of 64 px: minutes on a CPU",
    "tiny_dit": "the same with a DiT", "tiny_mmdit": "the same with an MMDiT",
    "5090_week": "a DiT on public captions, autoencoder and text encoder: a week of one RTX 5090",
    "5090_week_unet": "the same with a U-Net",
}
FIELDS = {                          # flag -> (file with a config, its class)
    "--unet": ("models/unet.py", "UNetConfig"), "--dit": ("models/dit.py", "DiTConfig"),
    "--net, of mmdit": ("models/mmdit.py", "MMDiTConfig"), "--net, of flux": ("models/flux.py", "FluxConfig"),
    "--vae": ("models/vae.py", "VAEConfig"), "--vae, of taesd": ("models/taesd.py", "TAESDConfig"),
    "--text": ("models/clip_text.py", "CLIPTextConfig"),
}
FOUND = ("in_channels", "out_channels", "context_dim", "pooled_dim", "sample_size", "vocab_size")      # by the other parts of the model


@cache                              # parse() asks for all of them each time, and reading a source takes milliseconds
def fields(file: str, name: str) -> tuple[str, ...]:
    """The fields of a dataclass with their defaults, as in "depth=2"; without those that follow from other parts of a model."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    return tuple(f"{node.target.id}={ast.unparse(node.value).strip('()').replace(' ', '').rstrip(',')}" if node.value else node.target.id
                 for node in body if isinstance(node, ast.AnnAssign) and node.target.id not in FOUND)


def epilog(whole: bool) -> str:
    """What follows the flags: presets and, for a script that knows all settings, the fields of the networks."""
    lines = ["presets:", *(f"  {name:15} {text}" for name, text in SHOWN.items())]
    if whole:
        lines += ["", f"presets of an autoencoder (--vae-preset): {', '.join(VAE_PRESETS)}", "",
                  "KEY=VALUE, with the defaults outside presets:"]
        for flag, place in FIELDS.items():
            lines.append(f"  {flag:15}")
            for word in fields(*place):
                if len(lines[-1]) + len(word) > 130:
                    lines.append(" " * 17)
                lines[-1] += f" {word}"
    return "\n".join(lines)


def with_default(text: str, default: Any) -> str:
    """A setting's line of help with its default outside presets, where it has one that says something and does not name it itself."""
    silent = default in ("", None, [], {}, False) or "default" in text
    return text.replace("%", "%%") if silent else f"{text} (default: {default})".replace("%", "%%")
