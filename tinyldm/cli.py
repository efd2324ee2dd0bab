"""What the scripts share at the keyboard: one way to parse, one way to fail.

An error is one line that says what is wrong and how to mend it, with exit code 2. Set TINYLDM_TRACEBACK=1 to
see the traceback behind it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from tinyldm.lookup import nearest


class Parser(argparse.ArgumentParser):
    """argparse that takes `-` and `_` alike, no abbreviations, and answers a misspelt flag with the nearest one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else list(args)
        words = [flag.replace("_", "-") + equals + value if flag.startswith("--") else word
                 for word in words for flag, equals, value in [word.partition("=")]]
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            hint = nearest(flag, self._option_string_actions)
            self.error(f"unknown argument '{flag}': {hint}--help lists all")
        return known

    def error(self, message: str) -> None:
        fail(message)


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """How to draw, for every script that draws: what pipeline.draw_settings takes. All are None unless typed."""
    add = parser.add_argument
    add("--cfg", "--guidance-scale", "--scale", type=float, metavar="W", help="guidance scale, 1 is none (default: the model's)")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="sampling steps (default: the model's)")
    add("--sampler", metavar="NAME", help="ddim, ddpm, euler, euler_a, heun, edm, lms, pndm, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc, "
        "adaptive (default: the model's)")
    add("--schedule", metavar="NAME", help="karras, trailing, leading, linspace, ... (default: the model's)")


def fail(message: str) -> None:
    """Print one line and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def guard(main: Callable[[], None]) -> None:
    """Run a script: errors that a person can mend become one line, a closed pipe becomes silence."""
    try:
        main()
    except BrokenPipeError:
        os._exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("TINYLDM_TRACEBACK"):
            raise
        fail(" ".join(str(error).split()) or type(error).__name__)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{type(error).__name__} {error}".lower() or os.environ.get("TINYLDM_TRACEBACK"):
            raise
        fail(f"out of memory: use a smaller --batch-size, fewer pixels, or --dtype bf16 ({' '.join(str(error).split())[:200]})")


class BestEffortStream:
    """A stream whose reader may go away (a closed terminal, a broken pipe): what cannot be written then is dropped, so that a
    long run goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
