"""Measure a trained model.

    python evaluate.py runs/tiny                             prompt accuracy, on 500 pictures
    python evaluate.py runs/tiny --count 2000 --cfg 2        more pictures, another guidance scale
    python evaluate.py runs/tiny --metric prompts            metrics by name; several at once as a,b

Metrics that ask for the same prompts share their pictures. Each writes its result to RUN/evaluation/METRIC.json (or
--out) as soon as it is measured. The table of metrics is tinyldm/evaluation/metrics.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinyldm.cli import Parser, add_drawing_flags, check_seed, fail, guard, outlive_terminal
from tinyldm.evaluation.metrics import METRICS, metric_flags, metric_names
from tinyldm.lookup import device_name, dtype_name


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="run or model folder, hub id or checkpoint file")
    about = "; ".join(f"{name}: {metric.help}" for name, metric in METRICS.items())
    add("--metric", nargs="+", default=["prompts"], metavar="NAME", help=f"{about} (default: prompts)".replace("%", "%%"))
    add("--count", type=int, default=500, metavar="N", help="pictures to draw; for prompts, half of them of pairs never trained on "
        "(default: 500)")
    add_drawing_flags(parser)
    add("--batch-size", type=int, default=50, metavar="B", help="pictures drawn at once")
    add("--seed", type=int, default=0, metavar="S", help="seed of the first picture; the next has S + 1")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda (or cuda:1, ...), mps")
    add("--dtype", default="auto", metavar="NAME", help="autocast: auto (bf16 where the device computes it natively), bf16 (bfloat16), "
        "fp32 (float32)")
    add("--out", metavar="FOLDER", help="(default: RUN/evaluation; of a hub id or a file evaluation/NAME)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")
    own = [add(flag, **keywords).dest for flag, keywords in metric_flags().items()]
    args = parser.parse_args(argv)
    if args.run is None and len(args.metric) > 1:               # --metric a b RUN
        args.run = args.metric.pop()
    if args.run is None:
        fail("no RUN: name a run or model folder, as in 'python evaluate.py runs/tiny'")
    for name, least in (("count", 2), ("batch_size", 1), ("seed", 0), ("steps", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    try:
        args.metric = metric_names(args.metric)
        check_seed(args.seed)
        args.dtype, args.device = dtype_name(args.dtype), device_name(args.device)
    except ValueError as error:
        fail(str(error))
    args.options = {name: getattr(args, name) for name in own}
    return args


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    ARGS = parse()

import json
import traceback

from tinyldm.device import pick_device
from tinyldm.evaluation.base import Evaluation, Measurement
from tinyldm.files import make_output_folder, write_file
from tinyldm.folders.hub import is_hub_id
from tinyldm.folders.load import load_model
from tinyldm.pipeline import draw_settings
from tinyldm.training.run_folder import find_model


def load(args: argparse.Namespace) -> Evaluation:
    """The model that was asked for, and how to draw with it: as typed, else by the model's own defaults."""
    device = pick_device(args.device)
    source = find_model(args.run)
    model = load_model(source, device, ema=not args.no_ema)
    settings = draw_settings(model, sampler=args.sampler, schedule=args.schedule, steps=args.steps, cfg=args.cfg, true_cfg=args.true_cfg)
    return Evaluation(model, source, settings, device, Path(args.out) if args.out else usual_output(args.run),
                      args.count, args.seed, args.batch_size, args.dtype, args.no_ema, args.options)


def usual_output(run: str) -> Path:
    """RUN/evaluation of a folder. Of a hub id it is evaluation/OWNER--NAME here, because a folder OWNER/NAME would be taken for the
    model from then on; of a file evaluation/FILE, because no folder can be made below it."""
    folder = Path(run)
    return folder / "evaluation" if folder.is_dir() else Path("evaluation", run.replace("/", "--") if is_hub_id(run) else folder.name)


def report(name: str, result: Measurement, out: Path) -> None:
    """Write the record, and print what people read and the files."""
    write_file(out / f"{name}.json", json.dumps(result.record, indent=1) + "\n")
    print(*result.lines, "", *result.files, out / f"{name}.json", sep="\n", flush=True)


def measure(name: str, evaluation: Evaluation) -> int:
    """Measure one metric and report it -> an exit code. Errors are printed, not raised: the other metrics are still measured."""
    try:
        guard(lambda: report(name, METRICS[name].measure(evaluation), evaluation.out))
    except SystemExit as end:                               # guard has printed the reason
        return end.code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    args = ARGS
    evaluation = load(args)
    for name in args.metric:
        METRICS[name].check(evaluation)
    make_output_folder(evaluation.out)
    failed = {name: code for name in args.metric if (code := measure(name, evaluation))}
    if failed:
        if len(args.metric) > 1:
            print(f"error: not measured, for the reasons above: {', '.join(failed)}", file=sys.stderr)
        sys.exit(max(failed.values()))


if __name__ == "__main__":
    outlive_terminal()
    guard(main)
