"""Embeddings in pictures, as AUTOMATIC1111 shares them: the picture shows what the token stands for, and carries its vectors.

They are JSON in one of two places: in a text of a PNG, as base64; or, compressed by zlib, in the lowest four bits of all colours in two
blocks of pixels on the left and on the right of the picture proper, from which a black column parts them. The left block has the low
halves of the bytes and the right block the high ones, both masked by the same random numbers. That survives where texts are removed.
(AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion/image_embedding.py)
"""

from __future__ import annotations

import base64
import json
import zlib
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tinyldm.files import INCOMPLETE

PICTURES = (".png", ".webp", ".jxl", ".avif")
CHUNK = "sd-ti-embedding"
LARGEST = 1 << 26           # bytes of JSON: a picture of a few bytes could unpack to any number of them


def read_picture(path: Path) -> Any:
    """What a picture carries. ValueError for one that carries nothing, is damaged, or is not there."""
    try:
        with Image.open(path) as picture:
            text = picture.info.get(CHUNK)
            hidden = None if text else hidden_bytes(np.array(picture.convert("RGB")))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: {INCOMPLETE}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}): {INCOMPLETE}") from error
    if not text and hidden is None:
        raise ValueError(f"{path} carries no embedding, neither as a text '{CHUNK}' nor in its pixels: is it only a picture?")
    try:
        content = base64.b64decode(text, validate=True) if text else zlib.decompressobj().decompress(hidden, LARGEST)
        return json.loads(content, object_hook=_tensor_of_json)
    except (ValueError, TypeError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path}: the embedding that it carries is damaged, or it is only a picture: {INCOMPLETE}") from error


def hidden_bytes(pixels: np.ndarray) -> bytes | None:
    """The bytes in the two blocks of a picture, uint8 [h, w, 3]; None where no black column parts them from it."""
    bright = (pixels > 0).all(2)
    if not bright.any():
        return None
    rows, columns = (np.flatnonzero(bright.any(axis)) for axis in (1, 0))
    halves = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    black = np.flatnonzero(halves.max((0, 2)) == 0)
    if len(black) < 2 or black[0] != halves.shape[1] - 1 - black[-1]:
        return None
    low, high = halves[:, : black[0]], halves[:, black[-1] + 1 :]
    mask = np.array(random_numbers(low.size), np.uint8).reshape(low.shape) & 15
    return ((high ^ mask) << 4 | low ^ mask).tobytes()


def random_numbers(count: int) -> list[int]:
    """The numbers of a linear congruential generator, modulo 255."""
    states = accumulate(repeat(None, count), lambda state, _: (1664525 * state + 1013904223) % 2**32, initial=0)
    return [state % 255 for state in states][1:]


def _tensor_of_json(content: dict) -> Any:
    return torch.tensor(content["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in content else content
