"""Prior preservation of DreamBooth (arXiv:2208.12242, Sec. 3.3): the model draws pictures of what its new subject is one of, before it
is trained, and is trained on them too. So it goes on drawing them, and its other subjects stay apart from the new one.

    RUN/class/000000.png ...    picture i is drawn from seed i alone: those that are there are not drawn again
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from tqdm import tqdm

from tinyldm.config import Config, change
from tinyldm.data.sources import parse_sources
from tinyldm.device import autocast
from tinyldm.offload import place_for_weights
from tinyldm.pictures.pixels import write_picture
from tinyldm.pipeline import PromptFeatures, draw, draw_settings
from tinyldm.planning.base import load_base
from tinyldm.planning.drawing import Order, offload_to_fit
from tinyldm.training.context import RunContext

AT_ONCE = 4                             # pictures drawn at once
FOLDER = "class"


def add_class_pictures(config: Config, context: RunContext) -> Config:
    """The config with the class's pictures as a further source of data, from which half of the samples come; where there is no --class,
    the same config. All processes draw those that are missing together, and all call this."""
    prompt, folder = config.finetune.class_prompt, context.folder / FOLDER
    if not prompt or config.data.cache:
        return config
    missing = [i for i in range(config.finetune.class_pictures) if not file_of(folder, i).exists()]
    context.world.barrier()                                     # all have looked before one draws
    if own := missing[context.world.rank::context.world.size]:
        draw_class_pictures(config, context, folder, own)
    context.world.barrier()
    sources = parse_sources(config.data.sources)
    weights = [float(weight or 1) for _, weight in sources]
    words = [f"{spec}:{weight:g}" for (spec, _), weight in zip(sources, weights)]
    return change(config, data=[*words, f"{folder}:{sum(weights):g}"], captions=[*(config.data.captions or [""] * len(sources)), prompt])


def loss_weights(config: Config) -> tuple[float, ...]:
    """A factor of the losses for every source, the class's pictures being the last; (): all are 1."""
    own = config.finetune
    if not own.class_prompt or config.data.cache:
        return ()
    return (*[1.0] * (len(config.data.sources) - 1), own.prior_weight)


def file_of(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def draw_class_pictures(config: Config, context: RunContext, folder: Path, numbers: list[int]) -> None:
    """Draw the pictures of these numbers, each of which is written as soon as it is drawn."""
    device, side = context.device, config.data.resolution
    folder.mkdir(exist_ok=True)
    with place_for_weights(device, "auto" if device.type == "cuda" else None) as place:
        model = load_base(config, device, place)
    settings, prompt = draw_settings(model), config.finetune.class_prompt
    if device.type == "cuda":
        model = offload_to_fit(model, device, "auto", Order(settings, ["", prompt], AT_ONCE, side, side))
    features = PromptFeatures(model)
    print(f"the model draws {len(numbers):,} pictures of the class: {prompt}")
    with tqdm(total=len(numbers), unit=" pictures", dynamic_ncols=True, disable=None) as bar:
        for chunk in (numbers[i:i + AT_ONCE] for i in range(0, len(numbers), AT_ONCE)):
            context.check()                                     # raises Interrupted after a signal
            with autocast(device, config.run.dtype):
                images = draw(model, [prompt] * len(chunk), chunk, settings, width=side, height=side, features=features)
            for i, image in zip(chunk, images):
                write_picture(file_of(folder, i), image)
            bar.update(len(chunk))
    del model, features
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
