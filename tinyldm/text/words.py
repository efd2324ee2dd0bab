"""The words that a model's captions held: a model whose text encoder was trained along knows no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MOST = 1000                 # distinct words that are kept with a model: of more, which a prompt lacks says little
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def words_of(captions: Iterable[str]) -> list[str]:
    """The distinct words of captions, in lower case, sorted; [] where there are more than MOST."""
    found: set[str] = set()
    for caption in captions:
        found.update(WORD.findall(caption.lower()))
        if len(found) > MOST:
            return []
    return sorted(found)


def unknown(prompts: Iterable[str], known: Sequence[str]) -> list[str]:
    """The words of prompts that no caption held, in their order; [] where the known words are not known."""
    words = dict.fromkeys(word for prompt in prompts for word in WORD.findall(prompt.lower()))
    return [word for word in words if known and word not in known]
