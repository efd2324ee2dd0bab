"""Adapters as they are named on a command line, with their strengths."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Wanted(NamedTuple):
    """An adapter to draw with: a file or a folder, and the factors of its changes."""

    path: str
    net: float = 1.0
    text: float | None = None                   # of text encoders; None: as of the network
    blocks: Mapping[str, float] = MappingProxyType({})      # the beginning of names in the network -> a further factor

    def strength(self, part: str, name: str) -> float:
        """The factor of the change of a weight, by its name in a part of the model. Of blocks the longest name that fits counts."""
        if part != "net":
            return self.net if self.text is None else self.text
        fitting = [block for block in self.blocks if name.startswith(f"{block}.")]
        return self.net * (self.blocks[max(fitting, key=len)] if fitting else 1.0)

    def __str__(self) -> str:
        numbers = [self.net] if self.text is None else [self.net, self.text]
        blocks = [",".join(f"{name}={value:g}" for name, value in self.blocks.items())] if self.blocks else []
        return ":".join([self.path, *(f"{number:g}" for number in numbers), *blocks])


def add_lora_flag(parser: argparse.ArgumentParser) -> None:
    """Add --lora to a script that draws."""
    parser.add_argument("--lora", action="append", type=wanted, default=[], metavar="PATH[:S[:T]]", help="draw with an adapter: a "
                        ".safetensors file (LoRA, LoHa, LoKr, DoRA) or the run that trained it, at strength S (default: 1), of text "
                        "encoders T (default: S); once for each. A further factor of blocks comes last: PATH:1:down=0.5,up.1=0")


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """Add --lora and --embedding to a script that draws."""
    add_lora_flag(parser)
    parser.add_argument("--embedding", action="append", default=[], metavar="FILE[:TOKEN]", help="draw with a word of textual inversion: a "
                        "file of diffusers, AUTOMATIC1111 or kohya, or the run that trained it; TOKEN is what captions call it (default: "
                        "its own name); once for each")


def wanted(word: str) -> Wanted:
    """PATH[:STRENGTH[:TEXT]][:BLOCK=STRENGTH,...], for argparse."""
    path, blocks = word, {}
    if found := re.fullmatch(r"(.+):((?:[\w.]+=[^:,]+)(?:,[\w.]+=[^:,]+)*)", path):
        path = found[1]
        blocks = {name: _number(value, word) for name, value in (pair.split("=") for pair in found[2].split(","))}
    path, *numbers = _numbers(path)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{word} has {len(numbers)} strengths: at most one of the network and one of the text encoders")
    return Wanted(path, *(_number(number, word) for number in numbers or ["1"]), blocks=blocks)


def _numbers(word: str) -> list[str]:
    """The path, and the numbers behind its last colons. (C:\\file has a colon, too.)"""
    numbers: list[str] = []
    while (found := re.fullmatch(r"(.+):([^:/\\]*)", word)) and _is_number(found[2]):
        word, numbers = found[1], [found[2], *numbers]
    return [word, *numbers]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number(word: str, whole: str) -> float:
    if not _is_number(word) or not math.isfinite(float(word)) or abs(float(word)) > 100:
        raise argparse.ArgumentTypeError(f"{whole}: {word} is no strength of an adapter: 0 to 1 is usual")
    return float(word)
