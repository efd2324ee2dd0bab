"""The settings that drew a picture as a text in its file, `parameters` in AUTOMATIC1111's format, which many tools read back: the
prompt, a line with the negative prompt, and one line of `Name: value, Name: value`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

EXIF, COMMENT = 0x8769, 0x9286          # the Exif block and its field UserComment, which AUTOMATIC1111 writes and reads


def parameters(prompt: str, negative: str, facts: Mapping[str, Any]) -> str:
    """The text `parameters`. facts: name -> value; their order is kept. Names consist of letters, digits and spaces."""
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else []),
             ", ".join(f"{name}: {quote(str(value))}" for name, value in facts.items())]
    return "\n".join(lines)


def quote(value: str) -> str:
    """A value as it stands in `parameters`: as a JSON string where a reader would otherwise cut it short or take a part of it for
    another name and value, as in "fox, Steps: 99.png"."""
    plain = value and value == value.strip() and not re.search(r'[,:"\n]', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def exif_comment(text: str) -> Image.Exif:
    """An Exif block that holds a text, for formats without text of their own."""
    exif = Image.Exif()
    exif.get_ifd(EXIF)[COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif
