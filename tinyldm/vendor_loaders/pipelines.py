"""The pipeline classes that model_index.json names: what each holds and runs, and what it changes in its parts.

PIPELINES has the classes that are written, READ those of diffusers that are read, and REFUSED the reasons why others are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

ZERO_NEGATIVE = "force_zeros_for_empty_prompt"       # in model_index.json: without a negative prompt, its features are zeros
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
STABLE_DIFFUSION, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
SD3, FLUX, OWN = "StableDiffusion3Pipeline", "FluxPipeline", "TinyLDMPipeline"


def class_name(config: Mapping) -> str:
    """The class that a part's config.json names: diffusers writes it as _class_name, transformers as architectures."""
    return (config.get("architectures") or [config.get("_class_name")])[0]


class Configs(NamedTuple):
    """The configs of a model folder's parts, as they are written."""

    scheduler: Mapping[str, Any]
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: Sequence[Mapping[str, Any]]          # those of the text encoders that are there, in order

    @property
    def text_classes(self) -> list[str]:
        return [class_name(text) for text in self.texts]

    @property
    def stock(self) -> bool:
        """Whether diffusers has the classes of scheduler and autoencoder."""
        return not any(str(config.get("_class_name", "")).startswith("TinyLDM") for config in (self.scheduler, self.vae))


class Pipeline(NamedTuple):
    """A pipeline class, published or (OWN) one that only tinyldm opens.

    network     the published class of its network; "": any
    join        the rule that joins its text encoders' answers (text/encoders.py); OWN: tinyldm.json says it
    runs        configs of the parts -> whether it draws what tinyldm draws with such parts
    why_not     what it needs, as the reason where `runs` says no
    index       further entries of model_index.json
    flow_match  whether it runs FlowMatchEulerDiscreteScheduler
    shifts      whether it takes the VAE's shift_factor into account
    lengths     the network's config.json -> how many tokens each text encoder reads; None: what its tokenizer's folder says
    defaults    the network's config.json -> how diffusers draws with it unless told otherwise, as in tinyldm.json
    optional    folders of text encoders that a model may lack: zeros then stand for their features
    """

    network: str
    join: str
    runs: Callable[[Configs], bool]
    why_not: str = ""
    index: Mapping[str, Any] = MappingProxyType({})
    flow_match: bool = False
    shifts: bool = True
    lengths: Callable[[Mapping], Sequence[int | None]] = lambda network: ()
    defaults: Callable[[Mapping], Mapping[str, Any]] = lambda network: {}
    optional: frozenset[str] = frozenset()


TEXT_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
NO_SAFETY_CHECKER = {"safety_checker": [None, None], "requires_safety_checker": False, "feature_extractor": [None, None],
                     "image_encoder": [None, None]}
# FLUX.1 schnell, whose network is told no guidance scale, reads captions of half the length (black-forest-labs/flux, cli.py). FluxPipeline
# hands its own sigmas to the scheduler, evenly spaced ("trailing"), where StableDiffusion3Pipeline takes those of the scheduler.
FLUX_DEV = {"steps": 28, "cfg": 3.5, "schedule": "trailing"}
FLUX_SCHNELL = {"steps": 4, "cfg": 1.0, "schedule": "trailing", "distilled": True}

PIPELINES: dict[str, Pipeline] = {
    # It ignores the VAE's shift_factor, and takes a text encoder with projection by its outputs in another order.
    STABLE_DIFFUSION: Pipeline(
        "UNet2DConditionModel", "single",
        lambda parts: (parts.stock and not parts.vae.get("shift_factor") and parts.text_classes == [CLIP]
                       and not parts.network.get("addition_embed_type") and not parts.network.get("told")),
        "needs one text encoder, CLIP's without projection, a U-Net that is told neither sizes nor the length of a step, "
        "and a scheduler of diffusers",
        NO_SAFETY_CHECKER, shifts=False),
    SDXL: Pipeline(
        "UNet2DConditionModel", "sdxl",
        lambda parts: (parts.stock and not parts.vae.get("shift_factor") and parts.text_classes == [CLIP, PROJECTED]
                       and parts.network.get("addition_embed_type") == "text_time" and not parts.network.get("told")),
        "needs CLIP's text encoder and a second one with projection, a U-Net that is told sizes but no length of "
        "a step, and a scheduler of diffusers",
        {"feature_extractor": [None, None], "image_encoder": [None, None], "add_watermarker": None}, shifts=False,
        defaults=lambda network: {"cfg": 5.0}),
    SD3: Pipeline(
        "SD3Transformer2DModel", "sd3",
        lambda parts: (parts.stock and parts.vae.get("shift_factor") is not None and parts.scheduler["_class_name"] == FLOW_MATCH
                       and parts.text_classes in ([PROJECTED] * 2, [PROJECTED] * 2 + [T5])),
        "needs two CLIP text encoders with projection (and T5, or none), an autoencoder with shift_factor, and a flow",
        {"feature_extractor": [None, None], "image_encoder": [None, None]}, flow_match=True,
        lengths=lambda network: (None, None, 256), defaults=lambda network: {"steps": 28, "cfg": 7.0},
        optional=frozenset({"text_encoder_3"})),
    FLUX: Pipeline(
        "FluxTransformer2DModel", "flux",
        lambda parts: (parts.stock and parts.vae.get("shift_factor") is not None and parts.text_classes == [CLIP, T5]
                       and parts.scheduler["_class_name"] == FLOW_MATCH),
        "needs the text encoders CLIP and T5, an autoencoder with shift_factor, and a flow",
        {"feature_extractor": [None, None], "image_encoder": [None, None]}, flow_match=True,
        lengths=lambda network: (None, 512 if network.get("guidance_embeds") else 256),
        defaults=lambda network: FLUX_DEV if network.get("guidance_embeds") else FLUX_SCHNELL),
    OWN: Pipeline("", "single", lambda parts: True, flow_match=True),
}


def defaults(reading: Reading, index: Mapping, network: Mapping) -> dict[str, Any]:
    """How the pipeline class draws unless told otherwise, as in tinyldm.json. index: model_index.json of the folder; network: the
    network's config.json."""
    row = PIPELINES[reading.written_as]
    zero = {"zero_negative": bool(index.get(ZERO_NEGATIVE, True))} if reading.written_as == SDXL else {}
    return {**row.defaults(network), **({} if row.join == "single" else {"text_join": row.join}), **zero, **reading.defaults}


def text_row(name: str, join: str) -> Pipeline:
    """The row that says which text encoders a model may lack and how many tokens each reads. OWN takes any that a published pipeline
    joins by the same rule."""
    rows = (row for row in PIPELINES.values() if name == OWN and row.join == join)
    return next(rows, PIPELINES[name])


def for_parts(parts: Configs, join: str) -> str:
    """The pipeline class that draws with these parts what tinyldm draws: OWN where no published one does."""
    name = written_as(str(parts.network.get("_class_name")), join)
    return name if PIPELINES[name].runs(parts) else OWN


def written_as(network_class: str, join: str) -> str:
    """The pipeline class for a network of this published class whose text encoders are joined by this rule: a key of PIPELINES."""
    return next((name for name, row in PIPELINES.items() if (row.network, row.join) == (network_class, join)), OWN)


class Reading(NamedTuple):
    """How the folder of a published pipeline is read."""

    written_as: str                 # the row of PIPELINES with the same parts
    scheduler: Mapping[str, Any]    # fields of scheduler_config.json that its constructor sets, whatever the file says
    without: str = ""               # what the class does in addition, which is left out here
    defaults: Mapping[str, Any] = MappingProxyType({})      # how it draws unless told otherwise, where that is not its row's


# What the constructors of diffusers 0.42 change. What they change in the U-Net's config is in unet.py.
_FROM_NOISE = {"steps_offset": 1, "clip_sample": False}
READ = {
    STABLE_DIFFUSION: Reading(STABLE_DIFFUSION, _FROM_NOISE),
    "StableDiffusionImg2ImgPipeline": Reading(STABLE_DIFFUSION, _FROM_NOISE),
    "StableDiffusionInpaintPipeline": Reading(STABLE_DIFFUSION, {"steps_offset": 1, "skip_prk_steps": True}),
    "StableDiffusionInpaintPipelineLegacy": Reading(STABLE_DIFFUSION, _FROM_NOISE),
    "StableDiffusionPipelineSafe": Reading(STABLE_DIFFUSION, _FROM_NOISE, "its guidance away from unsafe content"),
    # The guidance scale is told to the U-Net, as Stable Diffusion's pipeline does with such a U-Net too.
    **dict.fromkeys(("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
                    Reading(STABLE_DIFFUSION, {}, defaults={"steps": 4, "cfg": 8.5})),
    **dict.fromkeys((SDXL, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"), Reading(SDXL, {})),
    **dict.fromkeys((SD3, "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"), Reading(SD3, {})),
    **dict.fromkeys((FLUX, "FluxImg2ImgPipeline", "FluxInpaintPipeline"), Reading(FLUX, {})),
    "FluxKontextPipeline": Reading(FLUX, {}, "the picture that it edits"),
}

# Pattern of a class name -> why its folder is not read; the first that fits.
REFUSED = {
    r"Flax.*": "its weights are Flax's, in msgpack: take the branch of the repository for PyTorch (--revision main)",
    r"(Onnx|ORT|OV|Neuron).*|.*Onnx.*": "its weights are programs for another runtime, not tensors: take the folder for PyTorch",
    r".*(ControlNet|Adapter).*": "it draws with a further network that looks at a picture: take the folder of the model without it",
    r".*(Upscale|SuperRes|Depth2Img|Pix2Pix|ImageVariation|UnCLIP|GLIGEN|PaintByExample|LDM3D).*":
        "its U-Net takes more than noise and a caption",
    r"(AltDiffusion|LDMTextToImage).*": "its text encoder is not CLIP's",
    r"Flux(Fill|Control)\w*": "its network takes a further picture beside the noise",
    r"Flux2\w*": "FLUX.2 has another network than FLUX.1, and a language model as its text encoder",
    r"(PixArt|Sana|HunyuanDiT|AuraFlow|Lumina|Chroma|ZImage|QwenImage).*": "its network is a transformer that is not here",
    r"DiTPipeline": "it draws from the number of a class, not from a caption",
}


def find(index: Mapping, source: object) -> Reading:
    """How to read the model folder with this model_index.json. ValueError, with the reason, for one that cannot be read."""
    name = index.get("_class_name")
    if isinstance(name, list):                                  # [module, class]: the folder brings its own code
        name = " ".join(map(str, name))
    if index.get("requires_aesthetics_score"):
        raise ValueError(f"{source} is Stable Diffusion XL's refiner, which only finishes the pictures of the base model: take that")
    if name in READ or name in PIPELINES:
        return READ.get(name, Reading(name, {}))
    reason = next((reason for pattern, reason in REFUSED.items() if re.fullmatch(pattern, str(name))), None)
    if reason is None and {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= index.keys() and "text_encoder_2" not in index:
        reason = (f"it may have the parts of {STABLE_DIFFUSION}; if it does, write that _class_name into its model_index.json "
                  "to draw with them as that class does")
    raise ValueError(f"{source} holds a {name}, which cannot be read: {reason or f'only {STABLE_DIFFUSION} and its like can'}")
