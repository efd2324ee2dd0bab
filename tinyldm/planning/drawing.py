"""Says what drawing with a model will take, before its weights are read: sample.py --dry-run.

The networks are shapes without values (load_model(..., "meta")), so that any machine plans a model of any size in seconds. Each part is
run on them once, at the size and in the numbers that were asked for. A GB is 10^9 bytes. Activations, and with them the peaks, are
estimates: what a GPU's libraries use to work is not counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tinyldm.device import free_memory, main_memory
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.noise import make_generators
from tinyldm.diffusion.ode import invert
from tinyldm.diffusion.process import at_size
from tinyldm.diffusion.samplers import find_sampler
from tinyldm.folders import hub, needed
from tinyldm.folders.build import load_network
from tinyldm.folders.parts import in_source
from tinyldm.folders.weights import find_weights
from tinyldm.model import Model, architecture, repeated_blocks
from tinyldm.models.layers import Cond
from tinyldm.offload import offload, weight_bytes
from tinyldm.pipeline import DrawSettings, PromptFeatures, check_size, decode_unchecked, guide, picture_size, remembering, with_extras
from tinyldm.planning.flops import count_flops, size
from tinyldm.planning.memory import RESERVE, empty
from tinyldm.planning.peak import AutocastOnMeta, LivePeak
from tinyldm.text.absent import AbsentText
from tinyldm.text.encoders import TextEncoder, TextEncoders, part_name
from tinyldm.vendor_loaders.pipelines import TEXT_FOLDERS

META = torch.device("meta")
LARGE = 2**22                       # pixels at once: fewer fit everywhere
SIDE = 512                          # of the picture that the memory of larger ones is told from


class Order(NamedTuple):
    """What is to be drawn."""

    settings: DrawSettings
    prompts: Sequence[str]          # the negative one is among them
    at_once: int                    # pictures in a batch
    width: int = 0                  # 0: the model's
    height: int = 0
    strength: float = 1.0           # the fraction of the steps that is run, for a picture to start from
    inverted: bool = False          # whether that picture's own noise is found first


class PlannedPart(NamedTuple):
    """What a part of a model takes."""

    module: nn.Module
    weights: int                    # bytes
    block_weights: int              # bytes on the device at most where it is moved by blocks (offload.py)
    activations: int                # bytes at its peak, an estimate
    flops: int                      # of a text encoder per caption, of the others per picture


class DrawingPlan(NamedTuple):
    order: Order
    parts: dict[str, PlannedPart]
    calls: int                      # of the network per picture; a guided one counts twice

    def peaks(self) -> dict[str, float]:
        """Bytes on the device at the peak by --offload, estimates; "": all parts stay there."""
        parts = self.parts.values()
        return {"": sum(part.weights for part in parts) + max(part.activations for part in parts) + RESERVE,
                "parts": max(part.weights + part.activations for part in parts) + RESERVE,
                "blocks": max(part.block_weights + part.activations for part in parts) + RESERVE}


def plan_drawing(model: Model, order: Order) -> DrawingPlan:
    """The plan for a model on any device. ValueError for a size that it cannot draw."""
    model, order = on_meta(model), sized(model, order)
    activations, flops = Meter(live_peak), Meter(counted_flops)
    run(replace(model, placement=activations), order)
    cond = run(replace(model, placement=flops), order._replace(prompts=order.prompts[:1], at_once=1))
    calls = network_calls(model, order)
    flops.found["net"] = sum(times * pictures * net_flops(model, cond, order, again, dict(options))
                             for (pictures, again, options), times in calls.items())
    parts = {part: PlannedPart(module, weight_bytes(module), bytes_by_blocks(module), activations.found[part], flops.found[part])
             for part, module in ((part, model.modules[part]) for part in (*model.text.modules, "net", "vae"))}
    return DrawingPlan(order, parts, sum(times * pictures for (pictures, *_), times in calls.items()))


def weights_that_fit(model: Model, order: Order, device: torch.device) -> int | None:
    """Bytes of weights that fit on the device now, beside the activations, for offload.offload; None: not known. A tenth of what is free
    is left to what is not counted (an estimate)."""
    if (free := free_memory(device)) is None:
        return None
    activations = Meter(live_peak)
    run(replace(on_meta(model), placement=activations), sized(model, order))
    return free * 9 // 10 - max(activations.found.values())


def check_memory(model: Model, order: Order, device: torch.device) -> None:
    """ValueError where the activations of large pictures cannot fit into the memory of the device: before the work, not after minutes, when
    the system has no memory left for anything. They are measured on a smaller picture, and grow at least with the pixels."""
    order = sized(model, order)
    pixels = order.width * order.height * order.at_once
    if pixels < LARGE or (have := free_memory(device) or main_memory()) is None:
        return
    side, activations = 8 * max(model.divisor, SIDE // 8 // model.divisor * model.divisor), Meter(live_peak)
    run(replace(on_meta(model), placement=activations), order._replace(width=side, height=side, at_once=1))
    if (need := activations.found["net"] * pixels / side**2) > have:
        raise ValueError(f"{order.at_once} x {order.width}x{order.height} pixels need {need / 1e9:,.0f} GB or more beside the weights, and "
                         f"{have / 1e9:,.0f} GB are there: use a smaller --batch-size, --width and --height")


def offload_to_fit(model: Model, device: torch.device, how: str, order: Order) -> Model:
    """offload.offload, with what fits on the device now. ValueError as of plan_drawing."""
    return offload(model, device, how, weights_that_fit(model, order, device) if how == "auto" else None)


def sized(model: Model, order: Order) -> Order:
    """The order with the pictures' size. ValueError for one that the model cannot draw."""
    width, height = picture_size(model, order.width, order.height)
    check_size(model, width, height)
    return order._replace(width=width, height=height)


def on_meta(model: Model) -> Model:
    """The same model as shapes without values."""
    shapes = lambda module: module if isinstance(module, AbsentText) else load_network(
        type(module), module.config, None, META, next(module.parameters()).dtype)
    text = TextEncoders([TextEncoder(shapes(module), tokenizer) for module, tokenizer in model.text.encoders], model.text.join)
    return replace(model, net=shapes(model.net), vae=shapes(model.vae), text=text, placement=None)


def bytes_by_blocks(module: nn.Module) -> int:
    """The most that is on the device when a module is moved by blocks: all but the blocks, and two of these, which may be the largest."""
    blocks = sorted(map(weight_bytes, repeated_blocks(module)), reverse=True)
    return weight_bytes(module) - sum(blocks[2:])


# ---- runs on the meta device


class Meter:
    """A model's placement (model.py) that moves nothing, and measures every part while it works."""

    device = META

    def __init__(self, measure: Callable[[], AbstractContextManager[Callable[[], int]]]):
        self.measure, self.found = measure, Counter()       # found: part -> its largest measurement

    @contextmanager
    def at_work(self, part: str) -> Iterator[None]:
        with self.measure() as result:
            yield
        self.found[part] = max(self.found[part], result())


@contextmanager
def live_peak() -> Iterator[Callable[[], int]]:
    """Bytes of the tensors that are made inside, at their peak."""
    with LivePeak() as memory, AutocastOnMeta(None):
        yield lambda: memory.peak


@contextmanager
def counted_flops() -> Iterator[Callable[[], int]]:
    with FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


@torch.no_grad()
def run(model: Model, order: Order) -> Cond:
    """All captions through the text encoders, a batch of latents once through the network, and once through the decoder, as pipeline.draw
    does that -> the condition of the batch."""
    features = PromptFeatures(model, order.settings.weighted)
    features.prepare(order.prompts)
    batch = order.at_once * (2 if order.settings.guided else 1)
    cond = with_extras(model, features([order.prompts[0]] * batch), order.settings, order.width, order.height)
    with model.at_work("net"):
        model.net(latents(model, order, batch, next(model.net.parameters()).dtype), empty(batch), remembering(model.net, cond))
    with model.at_work("vae"):
        decode_unchecked(model.vae, latents(model, order, order.at_once))
    return cond


def latents(model: Model, order: Order, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    f = model.vae.config.downscale
    return empty(batch, model.vae.config.latent_channels, order.height // f, order.width // f, dtype=dtype)


def net_flops(model: Model, cond: Cond, order: Order, again: bool, options: dict[str, Any]) -> int:
    """FLOPs of the network on one picture. cond: of a batch; again: what depends on the text alone has been computed in an earlier call;
    options: further arguments, such as skip_layers."""
    one, x = cond.tensor_split(len(cond.context))[0], latents(model, order, 1, next(model.net.parameters()).dtype)
    one = remembering(model.net, one)
    call = lambda: model.net(x, empty(1), one, **options)
    if again:
        call()
    return count_flops(call)


def network_calls(model: Model, order: Order) -> Counter[tuple[int, bool, tuple]]:
    """How often the network is called to draw a picture, by the pictures in a call, whether it is another one with the same condition, and
    its further arguments, sorted. The sampler itself
    is run, on latents of one pixel with a network that answers zeros, so that all guidance and every order of sampler count."""
    settings, calls = order.settings, Counter()
    levels = grid(at_size(model.process, order.height * order.width // model.divisor**2), settings.steps, settings.sampling.schedule,
                  strength=order.strength, **settings.sampling.grid)

    def conditional(cond: Cond, **options: Any):
        called = []

        def network(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            calls[len(x), bool(called), tuple(sorted(options.items()))] += 1
            called.append(True)
            return torch.zeros_like(x)
        return denoiser(network, cond, model.prediction)

    cond = Cond(torch.zeros(1, 1, 1))
    x = torch.randn(1, model.vae.config.latent_channels, 1, 1, generator=torch.Generator().manual_seed(0))
    for _ in invert(conditional(cond), x, levels) if order.inverted else ():
        pass
    denoise = guide(conditional, cond, cond, settings, model.prediction, levels)
    for _ in find_sampler(settings.sampling.sampler)(denoise, x, levels, generators=make_generators([0]), **settings.sampling.options):
        pass
    return calls


# ---- what is shown


def bytes_on_disk(source: str | Path, model: Model, variant: str | None = None, parts: Sequence[str] = ()) -> int | None:
    """The size of the weights files of a model's source, as load_model takes it, and of the sources of other parts. None: not all are
    on this machine.

    variant: that of the network and the text encoders, as load_part takes it."""
    path = hub.locate(source, needed.of_index)
    if path.is_file():
        return sum(file.stat().st_size for file in {path, *(found.source for source in parts for found in in_source(source))})
    folders = {"net": architecture(model.net).folder, "vae": "vae", **{part_name(i): name for i, name in enumerate(TEXT_FOLDERS)}}
    files: set[Path] = set()
    for part, module in model.modules.items():
        folder, stem = path / folders[part], architecture(module).stem
        found = find_weights(folder, stem, variant) or find_weights(folder, stem)
        if found is None:
            return None
        shards = json.loads(found.read_text("utf-8"))["weight_map"].values() if found.suffix == ".json" else [found.name]
        files |= {folder / name for name in shards}
    return sum(file.stat().st_size for file in files)


def render(plan: DrawingPlan, name: str, disk: int | None) -> str:
    """The plan as a table. name: of the model; disk: see bytes_on_disk."""
    order, parts, count = plan.order, plan.parts, len(dict.fromkeys(plan.order.prompts))
    dtypes = {part: str(next(planned.module.parameters()).dtype).removeprefix("torch.") for part, planned in parts.items()}
    lines = [f"{name}: nothing is drawn, and no weights are read", "",
             f"{'part':22}{'parameters':>16}{'dtype':>10}{'GB':>10}{'+ activations':>16}{'TFLOP':>12}"]
    for part, planned in parts.items():
        lines.append(f"{f'{part} ({type(planned.module).__name__})':22}{size(planned.module):16,}{dtypes[part]:>10}"
                     f"{planned.weights / 1e9:10.3f}{planned.activations / 1e9:16.3f}{planned.flops / 1e12:12.4g}")
    lines.append(f"{'all':22}{size(*(planned.module for planned in parts.values())):16,}{'':10}"
                 f"{sum(planned.weights for planned in parts.values()) / 1e9:10.3f}")
    guidance = f"cfg {order.settings.cfg:g}" if order.settings.guided else "no guidance"
    least = "at least " if order.settings.sampler == "adaptive" else ""
    lines += ["", f"  activations (estimate): {order.at_once} x {order.width}x{order.height}, {guidance}; {count} captions",
              "  TFLOP: of a text encoder per caption, of the others per picture", "",
              f"GB on the device at the peak (estimate, {RESERVE / 1e9:g} of them for CUDA)"]
    lines += [f"  {f'--offload {how}' if how else 'all parts there':32}{peak / 1e9:10.1f}" for how, peak in plan.peaks().items()]
    calls = f"{order.settings.steps} steps of {order.settings.sampler}"
    lines += ["", f"network calls per picture: {least}{plan.calls} ({calls}, {guidance})",
              f"weights to read: {f'{disk / 1e9:.3f} GB' if disk is not None else 'not on this machine yet'}"]
    return "\n".join(lines)
