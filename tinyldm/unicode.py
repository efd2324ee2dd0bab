"""Text that comes from outside the program: which of it a model may read, how the rest is shown, and where its lines end.

Python keeps bytes of an argument or of a file name that are not UTF-8 as lone surrogates (PEP 383). A file can be opened under such
a name, but a tokenizer, a PNG or a web page cannot hold it. So there is one rule. What a model reads (captions, prompts) must be
Unicode, and is refused otherwise: a replaced character would be another prompt. Names are kept as they are, and wherever they
become part of a text that is written, they are `shown`.
"""

from __future__ import annotations

from pathlib import Path


def check_unicode(text: str, what: str = "") -> str:
    """The text itself. ValueError where it holds a lone surrogate. what: begins the message."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what}'{text}' is not valid UTF-8: type it again, convert it, or rename the file or folder") from None
    return text


def shown(text: str) -> str:
    r"""The text with every lone surrogate as an escape: a name with the byte E9 as "caf\udce9"."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_lines(file: str | Path) -> list[str]:
    r"""The lines of a text file in UTF-8, without the byte order mark that some editors write. Only \n, \r\n and \r end a line; Python's
    str.splitlines also splits at form feeds, at U+0085 and at U+2028. OSError; ValueError where the file is not in UTF-8."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").split("\n")           # reading has turned \r\n and \r into \n
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None
