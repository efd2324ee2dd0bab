"""The table of metrics. To add one, write a file beside this one, and a row here.

The file defines `measure(evaluation) -> Measurement` and, where not every model will do, `check(evaluation)`; base.py says
what they get and give. A metric measures a model (RUN), an autoencoder (--vae), or pictures, which a model may draw. This module is
imported before the command line is parsed, so it must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyldm.lookup import lookup

if TYPE_CHECKING:
    from tinyldm.evaluation.base import Evaluation, Measurement


class Subject(NamedTuple):
    """A kind of thing that is measured."""

    how: str                                                    # what it is, and how it is named on the command line
    metric: str                                                 # what is measured of it unless --metric says otherwise


SUBJECTS = {"model": Subject("a model that draws: name it as RUN", "prompts"),
            "vae": Subject("an autoencoder: name it with --vae, without RUN", "reconstruction"),
            "pictures": Subject("pictures, or a model that draws some: name either as RUN", "is")}
MEASURED_OF = {"model": ("model", "pictures"), "vae": ("vae",), "pictures": ("pictures",)}      # subject -> `of` of its metrics


class Metric(NamedTuple):
    help: str                                                   # one line for --help
    measure: Callable[[Evaluation], Measurement]
    check: Callable[[Evaluation], None] = lambda evaluation: None       # ValueError with the reason for a model it cannot measure
    flags: Mapping[str, Mapping[str, Any]] = {}     # its own flags: "--name" -> keywords of add_argument; metrics may share one
    of: str = "model"                                           # what it measures: a key of SUBJECTS
    divided: bool = False                                       # whether torchrun's processes share the work; else the first does all
    number: str = ""                                            # what decides on the number of pictures, where --count does not


def deferred(file: str, function: str) -> Callable[[Evaluation], Any]:
    """A function of a file in this folder; the file, and torch with it, is imported when the function is called."""
    return lambda evaluation: getattr(import_module(f"tinyldm.evaluation.{file}"), function)(evaluation)


PICTURES: dict[str, dict[str, Any]] = {                         # flags of metrics of an autoencoder
    "--data": dict(nargs="+", metavar="WORD", help="with --vae: pictures, with captions or without: toyworld, folders, WebDataset tars, "
                   ".npz; paths, patterns or URLs"),
    "--resolution": dict(type=int, metavar="N", help="picture size in pixels (default: with --vae that of the autoencoder's training, "
                         "256 at most; of --reference that of the model's pictures; other files stay as they are)"),
    "--vae-lpips": dict(nargs="+", default=[], metavar="SOURCE", help="with --vae, for LPIPS: VGG16 or AlexNet, and its linear "
                        "layers: hub ids, folders or files, as in timm/vgg16.tv_in1k lpips/weights/v0.1"),
}

_RESOLUTION = {"--resolution": PICTURES["--resolution"]}
DRAWN: dict[str, dict[str, Any]] = {                            # flags of metrics of sets of pictures
    **_RESOLUTION,
    "--captions": dict(nargs="+", metavar="WORD", help="what to draw: COCO's annotations (.json), a .jsonl with \"prompt\"s, a .txt, or "
                       "data with captions (default: the data the model was trained on)"),
    "--weights": dict(nargs="+", default=[], metavar="TOWER=SOURCE", help="weights of networks whose features are compared: "
                      "inception=FILE; of clip, cmmd and dinov2 a hub id, folder or file"),
    "--replicates": dict(type=int, default=20, metavar="N", help="bootstrap replicates for 95 %% intervals (default: 20)"),
}
_RESIZE = {"--fid-resize": dict(default="tensorflow1", metavar="NAME", help="how pictures come to Inception's 299 px: tensorflow1 (the "
                                "original, torch-fidelity), clean (clean-fid), pytorch (pytorch-fid) (default: tensorflow1)")}
_CLIP = {"--clip": dict(default="", metavar="RUN", help="a run of train.py --objective contrastive, or any other CLIP: short for --weights "
                        "clip=RUN")}
_REFERENCE = {"--reference": dict(nargs="+", metavar="WORD", help="real pictures, as for --data, or an .npz of mu and sigma")}
COMPARED = DRAWN | _REFERENCE


def of_pictures(help: str, function: str, check: str, flags: Mapping[str, Mapping[str, Any]]) -> Metric:
    return Metric(help, deferred("picture_metrics", function), deferred("picture_metrics", check), flags, "pictures", True)


METRICS: dict[str, Metric] = {
    "prompts": Metric("share of pictures that show the caption's subject, colour and background",
                      deferred("prompts", "measure"), deferred("prompts", "check")),
    "reconstruction": Metric("what an autoencoder loses of the pictures of --data: PSNR, SSIM, LPIPS",
                             deferred("reconstruction", "measure"), deferred("reconstruction", "check"), PICTURES, "vae"),
    "seams": Metric("how far tiles can be seen where an autoencoder decodes large pictures", deferred("seams", "measure"),
                    deferred("seams", "check"), {"--data": PICTURES["--data"]}, "vae"),
    "fid": of_pictures("Fréchet distance of Inception features to --reference", "fid", "check_reference", COMPARED | _RESIZE),
    "is": of_pictures("Inception score", "inception_score", "check", DRAWN | _RESIZE),
    "kid": of_pictures("kernel distance of Inception features to --reference", "kid", "check_reference", COMPARED | _RESIZE),
    "clip": of_pictures("how well pictures fit their captions, by CLIP", "clip", "check", DRAWN | _CLIP),
    "cmmd": of_pictures("kernel distance of CLIP features to --reference", "cmmd", "check_reference", COMPARED),
    "fd_dino": of_pictures("Fréchet distance of DINOv2 features to --reference", "fd_dino", "check_reference", COMPARED),
    "precision_recall": of_pictures("precision, recall, density and coverage of Inception features beside --reference", "precision_recall",
                                    "check_reference", COMPARED | _RESIZE),
    "stats": of_pictures("statistics of pictures as an .npz, to be a --reference", "stats", "check", DRAWN | {
        "--tower": dict(default="inception", metavar="NAME", help="whose features: inception, inception-clean, inception-pytorch, cmmd, "
                        "dinov2, ... (default: inception)")}),
    "geneval": Metric("the folder of pictures that GenEval's scorer reads, of its prompts", deferred("geneval", "measure"),
                      deferred("geneval", "check"), {"--captions": DRAWN["--captions"]}, "pictures", True,
                      "it draws four pictures of each prompt of --captions, so a trial needs a file with few prompts"),
}


def metric_names(words: Iterable[str], of: str = "model") -> list[str]:
    """Names as typed, ["a,b", "c"], one by one and each once. ValueError for an unknown one (with the nearest name), one that does not
    measure `of`, or none."""
    names = [name for word in words for name in word.split(",") if name]
    for name in names:
        if (wanted := lookup(METRICS, name, "metric").of) not in MEASURED_OF[of]:
            raise ValueError(f"metric '{name}' measures {SUBJECTS[wanted].how}{', without --vae' if of == 'vae' else ''}"
                             f"{', in place of pictures' if of == 'pictures' and wanted == 'model' else ''}")
    if not names:
        raise ValueError(f"no metric is named: known: {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def metric_flags() -> dict[str, Mapping[str, Any]]:
    """The flags of all metrics; one that several metrics share is there once."""
    return {flag: keywords for metric in METRICS.values() for flag, keywords in metric.flags.items()}
