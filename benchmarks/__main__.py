"""Our code beside diffusers' and transformers', on the same weights and inputs.

    python -m benchmarks train  [--compile]     a training step: forward pass, backward pass, AdamW
    python -m benchmarks sample [--steps 20]    forward passes of networks, and whole pictures from captions
    python -m benchmarks encode                 text encoders and autoencoders
    python -m benchmarks load                   networks from files, in fresh processes

Each side works in a process of its own, and they take turns. Before anything is timed, their outputs must be equal up to rounding.

ms              median of --rounds turns
TFLOP/s         useful FLOPs (of matrix products and convolutions, however a side does them) in that time
of matmul       that rate relative to large products in the same dtype, measured in the same rounds
peak GB         highest memory during a call, less what was there before it
operations      kernels launched on CUDA; elsewhere operations of torch, which in compiled code leaves out fused loops
first call s    with compiling
error           of the output, relative to the peer's; of --approximate ways, relative to ours
times as fast   median of the ratios within rounds, and their quartiles

For a quick look: --scale small --rounds 3.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyldm.cli import guard, need

if TYPE_CHECKING:
    from benchmarks.bench.compare import Case, Options

RESULTS = Path(__file__).parent / "results" / "bench.jsonl"
COMMANDS = ("train", "sample", "encode", "load")
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "triton")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--only", nargs="+", metavar="WORD", default=[], help="cases with one of these words in their names (see --list)")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--scale", choices=("full", "small", "tiny"), default="full", help="of networks and inputs; tiny is for tests (default: full)")
    add("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"], help="of weights; in training bf16 is autocast "
        "(default: fp32 bf16)")
    add("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    add("--peer", choices=("diffusers", "none"), default="diffusers", help="none: our sides alone (default: diffusers, with transformers "
        "for text encoders)")
    add("--compile", action="store_true", help="further sides under torch.compile")
    add("--approximate", action="store_true", help="further ways to draw that change the picture, with their errors")
    add("--no-flash", action="store_true", help="torch's flash attention off: plain products on a CPU")
    add("--steps", type=int, default=20, help="of sampling (default: 20)")
    add("--rounds", type=int, default=7, help="(default: 7)")
    add("--threads", type=int, help="of each process (default: torch's)")
    add("--folder", default=tempfile.gettempdir(), help="where there is room for models that are written and removed again")
    add("--json", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="append a line for each case (default file: "
        "benchmarks/results/bench.jsonl)")
    args = parser.parse_args(words)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be 1 or more")
    return args


def machine(device: Any) -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    from tinyldm.version import version as own_version
    cpu = next((line.partition(":")[2].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    memory = next((int(line.split()[1]) * 1024 for line in lines("/proc/meminfo") if line.startswith("MemTotal")), None)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
            "memory_gb": memory and round(memory / 1e9, 1), "system": platform.platform(), "python": platform.python_version(),
            "versions": {name: installed(name) for name in PACKAGES} | {"tinyldm": own_version()}}


def lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").split("\n")
    except OSError:
        return []


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure_case(case: Case, options: Options, args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Run a case, print its rows, and append its line."""
    import torch

    from benchmarks.bench.compare import append, compare, line, record, rows
    from benchmarks.bench.measure import matmul_flops
    from benchmarks.bench.processes import Remote
    from tinyldm.device import DTYPES
    device = torch.device(options.device)
    case.prepare()
    workers = [Remote(case, side.name, options) for side in case.sides]
    try:
        found = compare(case, workers, args.rounds, lambda: matmul_flops(device, DTYPES[options.dtype]))
    finally:
        for worker in workers:
            worker.close()
    for cells in rows(found):
        print(line(cells), flush=True)
    if args.json:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        append(args.json, record(found, {"date": now, **about, "options": options._replace(folder="")._asdict()}))


def main() -> None:
    args = parse()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)       # before torch is imported, here and in the sides' processes
    if args.peer != "none":
        need("diffusers", "transformers")
    from benchmarks.bench.compare import HEAD, Options, line
    from benchmarks.bench.processes import all_cases
    from tinyldm.device import pick_device
    device = pick_device("cpu" if args.command == "load" and args.device == "auto" else args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        options = Options(args.command, args.scale, args.dtype[0], str(device), args.peer, args.compile, args.approximate,
                          not args.no_flash, args.steps, folder)
        every = [(case, typed) for typed in (options._replace(dtype=dtype) for dtype in args.dtype) for case in all_cases(typed)]
        chosen = [(case, typed) for case, typed in every if not args.only or any(word.lower() in case.name.lower() for word in args.only)]
        if not chosen:
            raise ValueError(f"--only {' '.join(args.only)} fits no case: {'; '.join(case.name for case, _ in every)}")
        if args.list:
            return print(*(case.name for case, _ in chosen), sep="\n")
        about = machine(device)
        print(f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}, {args.scale} size, "
              f"medians of {args.rounds} rounds\n\n{line(HEAD)}\n{line(['---', '---', *['---:'] * 7, '---'])}", flush=True)
        for case, typed in chosen:
            measure_case(case, typed, args, about)


if __name__ == "__main__":
    guard(main)
