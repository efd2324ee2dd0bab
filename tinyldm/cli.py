"""The command line of all scripts: parsing flags, printing, and reporting errors.

An error is printed as one line that says what is wrong and how to fix it, and the exit code is 2. Set TINYLDM_TRACEBACK=1 to see
the traceback.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from tinyldm.lookup import nearest
from tinyldm.unicode import check_unicode

# What torch, CUDA, cuBLAS and cuDNN (since version 9 in names that end in ALLOCATION_FAILED) say when memory has run out.
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED",
             "unable to find an engine")                       # cuDNN, where none of its algorithms had room to work
SIGPIPE = 13                            # Windows' signal module does not know it


class Parser(argparse.ArgumentParser):
    """argparse that treats `-` and `_` alike, allows no abbreviations, and suggests the nearest flag for a misspelt one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        print_anything()
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


def print_anything() -> None:
    """Let stdout and stderr show as an escape what their encoding lacks and what is no text at all. A caption or a file's name must
    not end a script, least of all after its work, where the terminal, LANG=C or PYTHONIOENCODING knows few characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def allow_expandable_segments() -> None:
    """Before torch is loaded: let its CUDA allocator extend blocks that are too small. Otherwise the lengths of captions, which change
    in every step, would leave gaps that no later tensor fits into. Only Linux has this. The variable has its older name, which all
    versions of torch read."""
    if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def caption(word: str) -> str:
    """A caption that is typed, for argparse."""
    try:
        return check_unicode(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_seed(seed: int, flag: str = "--seed") -> None:
    """ValueError for a seed that is too large: torch takes 64 bits with a sign, and pictures and stages have the seeds that follow."""
    if seed >= 2**62:
        raise ValueError(f"{flag} {seed} must be below 2^62")


def add_drawing_flags(parser: argparse.ArgumentParser, scale: Callable[[str], Any] = float) -> None:
    """Add the flags of every script that draws pictures, the arguments of pipeline.draw_settings. Their default is None. scale: what
    reads the word after --cfg."""
    add = parser.add_argument
    add("--cfg", "--guidance-scale", "--scale", type=scale, metavar="W", help="guidance scale; 1 or less is none, the prompt alone: "
        "turbo models want 0; of FLUX dev the number that the network is told (default: the model's)")
    add("--true-cfg", type=float, metavar="W", help="of FLUX dev: guidance scale against a negative prompt, at twice the cost (default: 1)")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="sampling steps (default: the model's)")
    add("--sampler", metavar="NAME", help="ddim, ddpm, euler, euler_a, heun, edm, lms, pndm, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc, "
        "adaptive (default: the model's)")
    add("--schedule", metavar="NAME", help="karras, trailing, leading, linspace, ... (default: the model's)")


def check_scale(scale: float | None, flag: str, usual: str = "1 or less is none, 7.5 is usual") -> None:
    """ValueError for a number that is no guidance scale."""
    if scale is not None and not abs(scale) < 1000:
        raise ValueError(f"{flag} {scale} is not a guidance scale: {usual}")


def add_offload_flag(parser: argparse.ArgumentParser) -> None:
    """Add --offload, for check_offload and offload.place_for_weights."""
    parser.add_argument("--offload", nargs="?", const="auto", metavar="HOW", help="for models larger than the GPU's memory: weights are "
                        "on the GPU only while they work. auto: the network by blocks where it does not fit; parts: never; blocks: "
                        "always (slowest, least memory)")


def check_offload(how: str | None, before: str) -> None:
    """ValueError for a word that is no way to offload. before: what may have been meant by it, and belongs before the flag."""
    if how not in (None, "auto", "parts", "blocks"):
        raise ValueError(f"--offload {how}: use auto, parts or blocks, or put {before} before it")


def fail(message: str) -> None:
    """Print one line and exit with code 2, also where nobody can read the line."""
    with suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def guard(main: Callable[[], None]) -> None:
    """Run a script. Errors that its user can fix are printed as one line. A closed output pipe ends it silently with 141, as a shell
    reports SIGPIPE: what comes after `&&` must not take cut work for finished."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(128 + SIGPIPE)
    except (ValueError, OSError) as error:
        if os.environ.get("TINYLDM_TRACEBACK"):
            raise
        fail(" ".join(str(error).split()) or type(error).__name__)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)) or os.environ.get("TINYLDM_TRACEBACK"):
            raise
        fail("out of memory: use a smaller --batch-size, fewer pixels, --dtype bf16 or, in sample.py, --offload "
             f"({' '.join(str(error).split())[:200]})")


class BestEffortStream:
    """A stream that drops what it cannot write, so that a long run survives a closed terminal or a broken pipe."""

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


def outlive_terminal() -> None:
    """Let this process go on, printing to nobody, when its terminal is closed or the reader of its output ends."""
    sys.stdout, sys.stderr = BestEffortStream(sys.stdout), BestEffortStream(sys.stderr)


def best_effort(what: str, work: Callable[[], Any]) -> None:
    """Do something that a long run can do without: if it fails, print why and go on."""
    try:
        work()
    except Exception as error:
        print(f"{what} failed, training goes on: {' '.join(str(error).split())[:200]}", flush=True)
