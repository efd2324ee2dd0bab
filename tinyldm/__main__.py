"""All scripts under one name, where the package is installed.

    tinyldm train --preset tiny             the same as python train.py --preset tiny
    python -m tinyldm sample "a red fox"    where no command was installed; torchrun -m tinyldm train ... for several GPUs
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tinyldm.cli import fail, print_anything
from tinyldm.lookup import nearest
from tinyldm.version import version

COMMANDS = {
    "train": "train a latent diffusion model, or an autoencoder; or train one further",
    "sample": "draw pictures from captions",
    "prepare": "encode captioned pictures ahead of training",
    "evaluate": "measure a model, an autoencoder or pictures",
    "export": "write a model as a folder or file to publish",
    "adapters": "look into, convert, shrink, extract and merge LoRA files",
    "reconstruct": "make averages of other widths from a run's checkpoints",
}
HERE = Path(__file__).resolve().parent


def find_script(name: str) -> Path | None:
    """The file of a script: in the package, where that was built as a wheel, else beside it, as in a clone. None: it is a module."""
    return next((file for file in (HERE / "scripts" / f"{name}.py", HERE.parent / f"{name}.py") if file.is_file()), None)


def main() -> None:
    """Run the command that is the first word. What follows is the script's."""
    print_anything()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return print(__doc__, *(f"  {command:13}{what}" for command, what in COMMANDS.items()), "",
                     "tinyldm COMMAND --help lists the flags of a command.", sep="\n")
    if name == "--version":
        return print(f"tinyldm {version()}")
    if name not in COMMANDS:
        fail(f"unknown command '{name}': {nearest(name, COMMANDS)}known: {', '.join(COMMANDS)}")
    sys.argv = [name, *rest]
    if file := find_script(name):
        runpy.run_path(str(file), run_name="__main__")
    else:
        runpy.run_module(f"tinyldm.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
