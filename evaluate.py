"""Measure a trained model, an autoencoder, or pictures.

    python evaluate.py runs/tiny                             prompt accuracy, on 500 pictures
    python evaluate.py runs/tiny --count 2000 --cfg 2        more pictures, another guidance scale
    python evaluate.py runs/tiny --metric prompts            metrics by name; several at once as a,b
    python evaluate.py --vae runs/tiny --data photos.tar     an autoencoder's reconstructions of pictures
    python evaluate.py runs/tiny --metric fid,clip --cfg 1.5,3,5 --num 30000 --captions captions_val2014.json
        --reference val2014/ --weights inception=FILE        at three guidance scales: a table and a curve
    python evaluate.py samples/ --metric fid --reference photos.npz --weights inception=FILE      pictures that are there already

Metrics that ask for the same prompts share their pictures. Each writes its result to RUN/evaluation/METRIC.json (or
--out) as soon as it is measured. The table of metrics is tinyldm/evaluation/metrics.py; docs/evaluation.md says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinyldm.cli import (Parser, add_drawing_flags, add_offload_flag, add_quantize_flag, begin, check_guidance, check_guided,
                         check_offload, check_scale, check_seed, check_shortcuts, check_steps, fail, guard, outlive_terminal)
from tinyldm.config.adapter_arguments import add_adapter_flags
from tinyldm.evaluation.metrics import METRICS, SUBJECTS, metric_flags, metric_names
from tinyldm.lookup import device_name, dtype_name

USUAL_COUNT = 500                   # pictures, unless --count says otherwise
DRAWING = ("cfg", "true_cfg", "steps", "sampler", "schedule", "guidance", "guidance_rescale", "guidance_interval", "autoguidance",
           "first_block_cache", "deep_cache", "offload", "quantize", "no_ema", "lora", "embedding")         # flags of models that draw


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="run or model folder, hub id or checkpoint file; or pictures: a folder, a shard")
    add("--vae", metavar="MODEL", help="an autoencoder, in RUN's place: what train.py takes as --vae-weights. --data names the pictures")
    about = "; ".join(f"{name}: {metric.help}" for name, metric in METRICS.items())
    add("--metric", nargs="+", metavar="NAME", help=f"{about} (default: prompts; with --vae reconstruction)".replace("%", "%%"))
    add("--count", "--num", type=int, metavar="N", help="pictures to draw or, with --vae, to read; for prompts, half of them of pairs "
        "never trained on (default: 500; of RUN that is pictures all)")
    add_drawing_flags(parser, scales)
    add("--batch-size", type=int, default=50, metavar="B", help="pictures drawn or read at once")
    add("--seed", type=int, default=0, metavar="S", help="seed of the first picture; the next has S + 1. With --vae "
        "that of toyworld's scenes")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda (or cuda:1, ...), mps")
    add("--dtype", default="auto", metavar="NAME", help="autocast: auto (bf16 where the device computes it natively), bf16 (bfloat16), "
        "fp32 (float32)")
    add_offload_flag(parser), add_quantize_flag(parser)
    add("--out", metavar="FOLDER", help="(default: RUN/evaluation or MODEL/evaluation; of a hub id or a file evaluation/NAME; with --lora "
        "or --embedding that of its first)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")
    add_adapter_flags(parser)
    own = {flag: add(flag, **keywords).dest for flag, keywords in metric_flags().items()}
    args = parser.parse_args(argv)
    if args.run is None and args.vae is None and len(args.metric or []) > 1:    # --metric a b RUN
        args.run = args.metric.pop()
    if args.run is None and args.vae is None:
        fail("no RUN: name a run or model folder, as in 'python evaluate.py runs/tiny'; or an autoencoder with --vae")
    if args.run and args.vae:
        fail(f"both RUN ({args.run}) and --vae {args.vae}: name one of them")
    for name, least in (("count", 2), ("batch_size", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    try:
        subject = "vae" if args.vae else "model"
        args.metric = metric_names(args.metric or [SUBJECTS[subject].metric], subject)
        check_used(args, own, parser)
        check_seed(args.seed), check_steps(args.steps), check_shortcuts(args), check_guidance(args)
        for scale in args.cfg or ():
            check_scale(scale, "--cfg")
        if args.autoguidance and args.offload:
            raise ValueError("--autoguidance steers away from a second model, which --offload has no part in: leave one of them out")
        check_scale(args.true_cfg, "--true-cfg")
        check_offload(args.offload, "RUN")
        args.dtype, args.device = dtype_name(args.dtype), device_name(args.device)
    except ValueError as error:
        fail(str(error))
    args.options = {name: getattr(args, name) for name in own.values()}
    return args


def scales(word: str) -> tuple[float, ...]:
    """Guidance scales, separated by commas."""
    return tuple(dict.fromkeys(map(float, word.split(","))))


def check_used(args: argparse.Namespace, own: dict[str, str], parser: Parser) -> None:
    """ValueError for a flag that was typed and changes nothing: one of drawing with --vae, or one of a metric that is not measured. own:
    the metrics' flags, and their names in `args`."""
    typed = lambda name: getattr(args, name) != parser.get_default(name)
    args.typed_for_drawing = [f"--{name.replace('_', '-')}" for name in DRAWING if typed(name)]
    if args.vae:
        refuse_drawing_flags(args)
    if len(args.cfg or ()) > 1 and (one := [name for name in args.metric if METRICS[name].of != "pictures"]):
        raise ValueError(f"--cfg with several scales: metric '{one[0]}' measures one at a time")
    if args.count is not None and all(METRICS[name].number for name in args.metric):
        raise ValueError(f"--count changes nothing in metric '{args.metric[0]}': {METRICS[args.metric[0]].number}; leave it out")
    for flag, name in own.items():
        if typed(name) and not any(flag in METRICS[each].flags for each in args.metric):
            raise ValueError(f"{flag} is for --metric {', '.join(name for name, row in METRICS.items() if flag in row.flags)}")


def refuse_drawing_flags(args: argparse.Namespace) -> None:
    """ValueError for a flag of drawing where nothing is drawn."""
    if args.typed_for_drawing:
        raise ValueError(f"{args.typed_for_drawing[0]} is for models that draw: leave it out with {'--vae' if args.vae else args.run}")


if __name__ == "__main__":                                   # before torch is loaded: --help and mistakes answer at once
    begin()
    ARGS = parse()

import json
import os
import signal
import traceback
from itertools import count as numbers

from tinyldm.adapters.embedding_files import split_token
from tinyldm.device import pick_device
from tinyldm.evaluation.base import Evaluation, Measurement, NotFirst
from tinyldm.evaluation.picture_sets import ALL, is_pictures
from tinyldm.evaluation.processes import finish
from tinyldm.files import make_output_folder, write_file
from tinyldm.folders.hub import is_hub_id
from tinyldm.folders.load import load_model, load_vae
from tinyldm.offload import place_for_weights
from tinyldm.pipeline import draw_settings
from tinyldm.planning.drawing import Order, offload_to_fit
from tinyldm.quantized import store_weights
from tinyldm.shortcuts import SHORTCUTS
from tinyldm.training.distributed import connect
from tinyldm.training.learned import apply_learned, load_worse
from tinyldm.training.run_folder import find_model


def load(args: argparse.Namespace) -> Evaluation:
    """What was asked for: an autoencoder, or a model and how to draw with it, as typed, else by the model's own defaults."""
    learned = [each.path for each in args.lora] + [str(split_token(each)[0]) for each in args.embedding]
    subject = (learned or [args.vae or args.run])[0]                           # the figures of an adapter are not those of its model
    device, out = pick_device(args.device), Path(args.out) if args.out else usual_output(subject)
    count = args.count or USUAL_COUNT
    if args.vae:
        return Evaluation(None, args.vae, None, device, out, count, args.seed, args.batch_size, args.dtype, args.no_ema, args.options,
                          load_vae(args.vae, device))
    if is_pictures(args.run):
        metric_names(args.metric, "pictures"), refuse_drawing_flags(args)
        return Evaluation(None, args.run, None, device, out, args.count or ALL, args.seed, args.batch_size, options=args.options)
    if args.options["resolution"] is not None and not args.options["reference"]:
        raise ValueError("--resolution is the size of pictures that are there, such as those of --reference: a model draws in its own; "
                         "leave it out")
    source = find_model(args.run)
    with place_for_weights(device, args.offload) as place:
        model = load_model(source, place, ema=not args.no_ema)
    apply_learned(model, args)
    if args.quantize:
        with place_for_weights(device, args.offload):
            store_weights(model, args.quantize)
    worse = load_worse(args.autoguidance, model, not args.no_ema)
    guidance = [draw_settings(model, sampler=args.sampler, schedule=args.schedule, steps=args.steps, cfg=scale, true_cfg=args.true_cfg,
                              guidance=args.guidance, worse=worse, shortcuts={name: getattr(args, name) for name in SHORTCUTS})
                ._replace(rescale=args.guidance_rescale, interval=args.guidance_interval)
                for scale in args.cfg or (None,)]
    check_guided(args, any(each.guided for each in guidance), "a guidance scale")
    settings = guidance[0]
    if args.offload:
        at_once = min(args.batch_size, count)
        captions = [f"caption {i}" for i in range(at_once)]             # a stand-in for the metrics' own: as many, and as long
        model = offload_to_fit(model, device, args.offload, Order(settings, ["", *captions], at_once))
    return Evaluation(model, source, settings, device, out, count, args.seed, args.batch_size, args.dtype, args.no_ema, args.options,
                      adapters={name: [*map(str, getattr(args, name))] for name in ("lora", "embedding") if getattr(args, name)}
                      | {name: [getattr(args, name)] for name in ("autoguidance", "quantize") if getattr(args, name)}, guidance=guidance)


def usual_output(run: str) -> Path:
    """RUN/evaluation of a folder. Of a hub id it is evaluation/OWNER--NAME here, because a folder OWNER/NAME would be taken for the
    model from then on; of a file evaluation/FILE, because no folder can be made below it."""
    folder = Path(run)
    return folder / "evaluation" if folder.is_dir() else Path("evaluation", run.replace("/", "--") if is_hub_id(run) else folder.name)


def report(name: str, result: Measurement, out: Path) -> None:
    """Write the record, and print what people read and the files. An earlier record of this name is kept under the next free number."""
    content = json.dumps(result.record, indent=1) + "\n"
    if (file := out / f"{name}.json").exists() and file.read_text(encoding="utf-8") != content:
        file.rename(next(path for i in numbers(1) if not (path := out / f"{name}-{i}.json").exists()))
    write_file(file, content)
    print(*result.lines, "", *result.files, file, sep="\n", flush=True)


def measure(name: str, evaluation: Evaluation) -> int:
    """Measure one metric and report it -> an exit code. Errors are printed, not raised: the other metrics are still measured."""
    if not METRICS[name].divided:
        return attempt(name, evaluation) if evaluation.world.main else 0
    code = attempt(name, evaluation)
    if evaluation.drawing and evaluation.world.size > 1:        # the others wait for files: torchrun ends them when this process ends
        sys.exit(code)
    finish(evaluation.world, bool(code))
    return code


def attempt(name: str, evaluation: Evaluation) -> int:
    try:
        guard(lambda: report(name, METRICS[name].measure(evaluation), evaluation.out))
    except SystemExit as end:                               # guard has printed the reason
        if end.code == 128 + signal.SIGINT:                 # Ctrl-C ends all
            raise
        return end.code
    except NotFirst:                                        # the share of one of torchrun's other processes is done
        return 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    args = ARGS
    evaluation = load(args)
    evaluation.world = connect(evaluation.device)
    if not evaluation.world.main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")      # the first process prints for all
    for name in args.metric:
        METRICS[name].check(evaluation)
    make_output_folder(evaluation.out)
    failed = {name: code for name in args.metric if (code := measure(name, evaluation))}
    if failed:
        if len(args.metric) > 1:
            print(f"error: not measured, for the reasons above: {', '.join(failed)}", file=sys.stderr)
        sys.exit(max(failed.values()))
    evaluation.world.close()


if __name__ == "__main__":
    outlive_terminal()
    guard(main)
