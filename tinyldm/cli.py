"""The command line of all scripts: parsing flags, printing, and reporting errors.

An error is printed as one line that says what is wrong and how to fix it, and the exit code is 2. Set TINYLDM_TRACEBACK=1 to see
the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from tinyldm.other_names import Differs, ours
from tinyldm.unicode import check_unicode
from tinyldm.version import version

# What torch, CUDA, cuBLAS and cuDNN (since version 9 in names that end in ALLOCATION_FAILED) say when memory has run out.
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED",
             "unable to find an engine")                       # cuDNN, where none of its algorithms had room to work
MOST_STEPS = 10_000                     # of a sampler
LARGEST = 16_384                        # pixels on a side of a picture
PATIENCE = 10.0                         # seconds in which torchrun has ended all processes of a host when one has failed
INTERVAL = (0.28, 5.42)                 # of sigma / alpha, in which guidance pays (arXiv:2404.07724, on Stable Diffusion XL)
NEAR = 0.75                             # how similar a flag must be to be suggested: with less, --epochs is near to --process
SIGPIPE = 13                            # Windows' signal module does not know it


class Version(argparse.Action):
    """--version"""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version and the commit, and stop")

    def __call__(self, parser: argparse.ArgumentParser, namespace, values, option_string=None) -> None:
        print(f"tinyldm {version()}")
        parser.exit()


class Quiet(argparse.Action):
    """--quiet"""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print errors and warnings alone")

    def __call__(self, parser: argparse.ArgumentParser, namespace, values, option_string=None) -> None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
        sys.stderr = WithoutBars(sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse that treats `-` and `_` alike, understands what other programs call a flag, allows no abbreviations, and suggests the
    nearest flag for a misspelt one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--version", action=Version), self.add_argument("--quiet", action=Quiet)
        self.translated: dict[str, str] = {}            # our flag -> another program's name of it, where that was typed

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        print_anything()
        known, unknown = self.parse_known_args(sys.argv[1:] if args is None else list(args), namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            flags = {other.lstrip("-"): other for other in self._option_string_actions}
            near = difflib.get_close_matches(flag.lstrip("-"), list(flags), n=1, cutoff=NEAR)
            hint = f"did you mean '{flags[near[0]]}'? " if near else ""
            self.error(f"unknown argument '{flag}': {hint}--help lists all")
        return known

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        return super().parse_known_args(self.translate(list(args or [])), namespace)

    def translate(self, words: list[str]) -> list[str]:
        """The words with our names for other programs' flags. One that means another thing is an error."""
        result, values = [], {}
        for word in words:
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-") if flag.startswith("--") else flag
            other = ours(flag, self._option_string_actions) if flag.startswith("-") else None
            if isinstance(other, Differs):
                self.error(f"{flag} {other.advice}")
            if not flag.startswith("-"):
                result.append(values.get(word, word))
            elif other is None:
                result.append(flag + equals + value if flag.startswith("--") else word)
            else:
                self.translated[other.ours] = flag
                result.append(other.ours + equals + other.values.get(value, value))
            values = other.values if other and not equals else {}
        return result

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
    add("--guidance", metavar="NAME", help="what guidance makes of its two guesses: cfg; apg, against glaring colours at a large --cfg; "
        "cfg_zero, for flows: docs/speed.md (default: cfg)")
    add("--guidance-rescale", type=float, default=0.0, metavar="R", help="0 to 1: how much of the standard deviation that guidance "
        "adds is removed again (default: 0; 0.7 is usual)")
    add("--guidance-interval", type=float, nargs="*", metavar="LOW HIGH", help="guidance only where LOW < sigma/alpha <= HIGH (noise over "
        "signal: large or infinite at first, 0 at the end); the other steps are twice as fast. Without numbers: {:g} {:g}, those "
        "published for Stable Diffusion XL".format(*INTERVAL))
    add("--autoguidance", metavar="MODEL", help="in place of the negative prompt, steer away from what a worse model draws of the same "
        "prompt: an earlier checkpoint's model folder, or a smaller model with the same latents and text encoders; --cfg 1.5 to 3")
    add("--first-block-cache", type=float, metavar="CHANGE", help="transformers: where the first block's answer has changed by less than "
        "this since the last full call, do not run the others; 0.05 to 0.15: docs/speed.md (default: run all)")
    add("--deep-cache", type=int, metavar="N", help="U-Nets: run the whole network in every N-th call, the outermost block alone in the "
        "others; 2 or 3: docs/speed.md (default: run all)")


def check_scale(scale: float | None, flag: str, usual: str = "1 or less is none, 7.5 is usual") -> None:
    """ValueError for a number that is no guidance scale."""
    if scale is not None and not abs(scale) < 1000:
        raise ValueError(f"{flag} {scale} is not a guidance scale: {usual}")


def check_steps(steps: int | None, flag: str = "--steps") -> None:
    """ValueError for a number of sampling steps that makes no sense: a level is a row of a table, and each costs calls of the network."""
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"{flag} {steps} must lie between 1 and {MOST_STEPS:,}: 20 to 50 are usual")


def check_guidance(args: argparse.Namespace) -> None:
    """Fill in the interval of a --guidance-interval without numbers. ValueError for numbers of guidance that mean nothing."""
    if not 0 <= args.guidance_rescale <= 1:
        raise ValueError(f"--guidance-rescale {args.guidance_rescale} must lie between 0 and 1")
    if args.guidance_interval is not None:
        args.guidance_interval = tuple(args.guidance_interval) or INTERVAL
        if len(args.guidance_interval) != 2 or not 0 <= args.guidance_interval[0] < args.guidance_interval[1]:
            raise ValueError("--guidance-interval must be two rising numbers from 0 on, such as 0.3 5, the last may be inf; or none")


def check_guided(args: argparse.Namespace, guided: bool, flag: str = "--cfg") -> None:
    """ValueError for a flag that changes guidance where there is none. flag: that of its scale."""
    for name in ("guidance_rescale", "guidance_interval", "guidance", "autoguidance"):
        if getattr(args, name) and not guided:
            raise ValueError(f"--{name.replace('_', '-')} has no guidance to change: use it with {flag} above 1")


def add_quantize_flag(parser: argparse.ArgumentParser) -> None:
    """Add --quantize, for quantized.store_weights."""
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="keep the weights of network and T5 in 8 bits, and make them whole "
                        "layer by layer: half the memory of bf16, a little slower; int8 has the smaller error (default: as they are)")


def check_shortcuts(args: argparse.Namespace) -> None:
    """ValueError for a value of a shortcut (shortcuts.py) that means nothing."""
    if args.first_block_cache is not None and not 0 <= args.first_block_cache < 1:
        raise ValueError(f"--first-block-cache {args.first_block_cache:g} must be at least 0 and below 1: 0.05 to 0.15 are usual")
    if args.deep_cache is not None and args.deep_cache < 1:
        raise ValueError(f"--deep-cache {args.deep_cache} must be 1 (run all) or more: 2 or 3 are usual")


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
    """Print one line and exit with code 2, also where nobody can read the line. Of several processes that torchrun started the first
    prints at once, and torchrun then ends the others, which make the same mistake, before they print theirs. It also gets the line for
    its own report, which is long."""
    with suppress(OSError, ValueError):
        if int(os.environ.get("LOCAL_RANK", 0)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
        print(f"error: {message}", file=sys.stderr, flush=True)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            write_report(file, message)
    sys.exit(2)


def write_report(file: str, message: str) -> None:
    """Write a message as torchrun expects it of its processes."""
    content = {"message": f"error: {message}", "timestamp": int(time.time())}
    with open(file, "w", encoding="utf-8") as handle:
        json.dump(content, handle)


def need(*packages: str) -> None:
    """End a script of benchmarks/ or docs/ in one line where a package is missing that the library itself does not need."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        fail(f"this script needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def begin() -> None:
    """What a script does first of all: from here on Ctrl-C ends it at once, without a traceback, while it loads torch, for example."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:           # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, quit_at_once)


def quit_at_once(number: int, frame) -> None:
    """A handler of SIGINT for work that leaves nothing behind."""
    os._exit(128 + number)


def guard(main: Callable[[], None]) -> None:
    """Run a script. Errors that its user can fix are printed as one line. A closed output pipe ends it silently with 141, as a shell
    reports SIGPIPE: what comes after `&&` must not take cut work for finished. Ctrl-C ends it with 130, after every `finally`."""
    if signal.getsignal(signal.SIGINT) is quit_at_once:         # from here on there may be something to finish or to clear away
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(128 + SIGPIPE)
    except KeyboardInterrupt:
        with suppress(OSError, ValueError):
            print("\nstopped", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
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


class WithoutBars(BestEffortStream):
    """A stream that drops the bars of tqdm, which begin by going back to the beginning of the line, and the ends of their lines."""

    bar = False             # whether a bar was the last that came

    def write(self, text: str) -> int:
        self.bar = text.startswith("\r") or self.bar and not text.strip()
        return len(text) if self.bar else super().write(text)


def outlive_terminal() -> None:
    """Let this process go on, printing to nobody, when its terminal is closed or the reader of its output ends."""
    sys.stdout, sys.stderr = BestEffortStream(sys.stdout), BestEffortStream(sys.stderr)


def best_effort(what: str, work: Callable[[], Any]) -> None:
    """Do something that a long run can do without: if it fails, print why and go on."""
    try:
        work()
    except Exception as error:
        print(f"{what} failed, training goes on: {' '.join(str(error).split())[:200]}", flush=True)
