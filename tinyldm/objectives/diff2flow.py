"""Diff2Flow: a model that was trained as a diffusion becomes a rectified flow, and is trained on as one (arXiv:2506.02221).

The change of variables, which is exact and trains nothing, is in diffusion/as_flow.py. A run of this objective begins with it: its
model has process and prediction of a flow, is saved and drawn with as such (by euler, in few steps), and the flow loss of its velocity

    | u(x_t, t) - (eps - x0) |^2,     x_t = (1 - t) x0 + t eps

is the diffusion loss of denoising.py, whose gradients go through the change of variables to the same weights. What it changes: levels
are drawn, and errors weighed, as flows do; and pure noise, at which a table such as Stable Diffusion's never trained its network, is
trained. The model is a teacher for reflow and mean flow then. With --max-steps 1 --lr 1e-12 it is written as it
is, to rounding.

The paper trains adapters too: write the model first, then train them beside it (--finetune lora --model RUN).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinyldm.config import Config
from tinyldm.diffusion.process import Flow, at_size
from tinyldm.model import Model
from tinyldm.objectives.denoising import Denoising
from tinyldm.vendor_loaders.scheduler import from_config, to_config
from tinyldm.vendor_loaders.scheduler_process import read_process


class Diff2Flow(Denoising):
    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(sampler="euler")

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if not config.finetune.whole:
            raise ValueError("--objective diff2flow changes a model that exists, and writes it whole: --teacher with the model; adapters "
                             "can be trained beside the flow that this makes")

    @classmethod
    def begins_as(cls, model: Model, config: Config) -> Model:
        return flow_model(model)


def flow_model(model: Model) -> Model:
    """The same model as a flow; one that is a flow already as it is. The network is changed in place."""
    if isinstance(at_size(model.process), Flow):
        return model
    if model.net.config.out_channels != model.net.config.in_channels:
        raise ValueError("the network learned its variance too, which a flow has no use for: --objective diff2flow needs one that did not")
    of, options, prediction = read_process(model.scheduler)
    scheduler = to_config("as_flow", dict(of=of, options=options, prediction=prediction), "flow", "euler")
    named = {} if model.text.join == "single" else {"text_join": model.text.join}
    defaults = {name: value for name, value in model.defaults.items() if name != "schedule"} | named | {"sampler": "euler"}
    process, kind = from_config(scheduler)
    return replace(model, process=process, prediction=kind, scheduler=scheduler, defaults=defaults)
