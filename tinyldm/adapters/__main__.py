"""Files of adapters: look into them, convert, shrink, extract and merge them.

    python -m tinyldm.adapters show dog.safetensors                                     what it changes, how strongly, what it is for
    python -m tinyldm.adapters convert dog.safetensors out.safetensors --model MODEL --layout kohya         for other programs
    python -m tinyldm.adapters resize dog.safetensors small.safetensors --rank 8        or --keep 0.95 of each layer's change
    python -m tinyldm.adapters extract MODEL FINETUNED out.safetensors --rank 32        what training changed, as a LoRA
    python -m tinyldm.adapters merge MODEL folder/ --lora dog.safetensors:0.8           a model with the adapter in its weights

MODEL is a run, a model folder, a hub id or a checkpoint file. An adapter is a .safetensors file, or the folder of the run that trained it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyldm.cli import Parser, begin, fail, guard
from tinyldm.config.adapter_arguments import add_lora_flag
from tinyldm.lookup import dtype_name

DTYPES = ("fp32", "fp16", "bf16")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="python -m tinyldm.adapters")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = lambda name, help: commands.add_parser(name, help=help)

    one = command("show", "print what an adapter holds")
    one.add_argument("adapter", metavar="ADAPTER")
    one = command("convert", "write an adapter under other names")
    one.add_argument("adapter", metavar="ADAPTER"), one.add_argument("out", metavar="OUT")
    one.add_argument("--model", required=True, metavar="MODEL", help="one that the adapter is for; its weights are not read")
    one.add_argument("--layout", required=True, metavar="NAME", help="diffusers (pipe.load_lora_weights) or kohya (most other programs)")
    one.add_argument("--dtype", metavar="NAME", help="fp32, fp16, bf16 (default: that of the file)")
    one = command("resize", "write an adapter of lower rank, and print how much of its changes it keeps")
    one.add_argument("adapter", metavar="ADAPTER"), one.add_argument("out", metavar="OUT")
    one.add_argument("--rank", type=int, metavar="N", help="the highest rank of a layer")
    one.add_argument("--keep", type=float, metavar="E", help="instead: in each layer the lowest rank that keeps this fraction of the "
                     "change, as squared Frobenius norm")
    one = command("extract", "write the difference of two models as a LoRA")
    one.add_argument("model", metavar="MODEL"), one.add_argument("tuned", metavar="FINETUNED"), one.add_argument("out", metavar="OUT")
    one.add_argument("--rank", type=int, default=32, metavar="N", help="of every layer, or its width where that is less (default: 32)")
    one.add_argument("--layout", default="diffusers", metavar="NAME", help="diffusers (default) or kohya")
    one.add_argument("--dtype", default="fp32", metavar="NAME", help="fp32 (default), fp16, bf16")
    one = command("merge", "write a model with adapters in its weights")
    one.add_argument("model", metavar="MODEL"), one.add_argument("out", metavar="FOLDER")
    add_lora_flag(one)
    one.add_argument("--dtype", default="fp32", metavar="NAME", help="of the weights: fp32 (default), fp16, bf16")

    args = parser.parse_args(argv)
    try:
        check(args)
    except ValueError as error:
        fail(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that cannot work."""
    if getattr(args, "dtype", None):
        args.dtype = dtype_name(args.dtype, DTYPES)
    if (rank := getattr(args, "rank", None)) is not None and rank < 1:
        raise ValueError(f"--rank {rank} must be 1 or more")
    if args.command == "resize" and (args.rank is None) == (args.keep is None):
        raise ValueError("resize needs one of --rank N and --keep E")
    if args.command == "resize" and args.keep is not None and not 0 < args.keep <= 1:
        raise ValueError(f"--keep {args.keep} must lie above 0 and at most at 1")
    if args.command == "merge" and not args.lora:
        raise ValueError("merge needs an adapter: --lora FILE, or --lora FILE:STRENGTH")
    if (out := getattr(args, "out", None)) is None:
        return
    if args.command == "merge":
        if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise ValueError(f"{out} is there already and not empty: name another folder")
    elif Path(out).suffix != ".safetensors":
        raise ValueError(f"{out}: adapters are written as .safetensors; name the file so")
    elif Path(out).exists():
        raise ValueError(f"{out} is there already: name another file")


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    begin()
    ARGS = parse()

from tinyldm.adapters.commands import COMMANDS


def main() -> None:
    COMMANDS[ARGS.command](ARGS)


if __name__ == "__main__":
    guard(main)
