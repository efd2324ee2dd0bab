"""Prompt weights: `a (red:1.4) fox` -> the plain caption, and one weight per token.

The syntax is AUTOMATIC1111's: (x) has weight 1.1, [x] 1 / 1.1, (x:1.3) 1.3, and nested weights multiply. A parenthesis that is
never closed reaches to the end; one that was never opened is text, as is one after a backslash. AUTOMATIC1111's other syntax
(prompt editing, AND, BREAK) is treated as text.
"""

from __future__ import annotations

import re

from tinyldm.text.base_tokenizer import BaseTokenizer

STEP = 1.1
SYMBOLS = re.compile(r"\\(?P<escaped>[\\()\[\]])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?\d*\.?\d+)\s*\)|(?P<close>[)\]])|[^\\()\[\]:]+|.",
                     re.DOTALL)


def parse_weights(text: str) -> list[tuple[str, float]]:
    """The plain caption as (piece, weight) in order, where neighbours have different weights; "" is one piece."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}       # for each open bracket, the index of the first piece inside it

    def weigh(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for symbol in SYMBOLS.finditer(text):
        bracket = {")": "(", "]": "["}.get(symbol[0][-1], "")
        if symbol["open"]:
            opened[symbol["open"]].append(len(pieces))
        elif symbol["weight"] and opened["("]:
            weigh("(", float(symbol["weight"]))
        elif symbol["close"] and opened[bracket]:
            weigh(bracket, STEP if bracket == "(" else 1 / STEP)
        else:
            pieces.append((symbol["escaped"] or symbol[0], 1.0))
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            weigh(bracket, factor)

    joined: list[tuple[str, float]] = []
    for piece, weight in pieces or [("", 1.0)]:
        same = bool(joined) and joined[-1][1] == weight
        joined[-1:] = [(joined[-1][0] + piece, weight)] if same else [*joined[-1:], (piece, weight)]
    return joined


def plain(text: str) -> str:
    """The caption without its weights."""
    return "".join(piece for piece, _ in parse_weights(text))


def token_weights(tokenizer: BaseTokenizer, text: str) -> list[float]:
    """One weight for each position of `tokenizer.encode([plain(text)])`: the weight of the token's first letter; 1 for BOS, EOS
    and padding. The plain caption is tokenised in one piece, so that weights of 1 change nothing. (White space is no letter: added
    tokens may take in what is before them.)"""
    letters = [(letter, weight) for piece, weight in parse_weights(text) for letter in piece]
    return [next((weight for letter, weight in letters[start:end] if not letter.isspace()), 1.0)
            for start, end in tokenizer.spans(plain(text))]
