"""One process for each side, so that nothing that one library sets, compiles or keeps in memory has an effect on the other.

The processes wait for each other: only the one works whose turn it is. The parent writes the name of a method of Work to a process's
stdin, and the process answers with a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.bench.compare import Case, Options, Turn
from tinyldm.cli import guard

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"train": ("training",), "sample": ("forward", "drawing"), "encode": ("forward",), "load": ("loading",)}     # modules of cases
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
         "DIFFUSERS_VERBOSITY": "error"}


def all_cases(options: Options) -> list[Case]:
    """The cases of a command, in the order of its tables."""
    return [case for module in COMMANDS[options.command] for case in import_module(f"benchmarks.bench.{module}").cases(options)]


class Remote:
    """A Work in a process of its own. fresh: a new process for every turn."""

    def __init__(self, case: Case, side: str, options: Options):
        self.side, self.fresh, self.process = side, case.fresh, None
        self.output_file = Path(options.folder) / f"output of {side}.safetensors"
        self.words = json.dumps({"case": case.name, "side": side, "output": str(self.output_file), "options": options._asdict()})

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.bench.processes", self.words], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | QUIET)

    def close(self) -> None:
        if self.process is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()                      # its loop ends
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def ask(self, method: str) -> Any:
        if self.fresh:
            self.close()
        if self.process is None:
            self.start()
        with suppress(BrokenPipeError):
            self.process.stdin.write(method + "\n")
            self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise ValueError(f"the process of {self.side} has ended with code {self.process.wait()}; its last lines say why")
        return json.loads(answer)

    def output(self) -> tuple[Tensor, float]:
        took = self.ask("output")
        return load_file(self.output_file)["output"], took

    def run(self) -> Turn:
        return Turn(*self.ask("run"))

    def peak(self) -> float | None:
        return self.ask("peak")

    def launches(self) -> int:
        return self.ask("launches")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                               # what libraries print must not come between the answers
    words = json.loads(sys.argv[1])
    options = Options(**words["options"])
    torch.backends.cuda.enable_flash_sdp(options.flash)
    case = next(case for case in all_cases(options) if case.name == words["case"])
    side = next(side for side in case.sides if side.name == words["side"])
    side.settings()
    work = side.build()
    for method in sys.stdin:
        found = getattr(work, method.strip())()
        if method.strip() == "output":
            output, found = found
            save_file({"output": output.contiguous()}, words["output"])
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    guard(main)
