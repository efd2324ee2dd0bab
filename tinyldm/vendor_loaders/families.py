"""Single-file checkpoints: what each family of models holds, under which prefixes, and what the file does not say.

A checkpoint has no config. The tensors tell the family and the sizes; everything else (activations, padding, scaling, the scheduler)
is what the family was published with, and is in FAMILIES. OTHERS names the files that are none of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.models.t5 import T5Config
from tinyldm.text.tokenizer import EOS
from tinyldm.vendor_loaders import pipelines
from tinyldm.vendor_loaders.layout import Shape

NETWORK = "model.diffusion_model."      # the prefix of the network in a whole checkpoint; files of a network alone may omit it
VAE = ("first_stage_model.", "vae.")    # of the VAE, the second in ComfyUI's files of FLUX.1
BESIDE = ("cond_stage_model.", "conditioner.", "text_encoders.", "model_ema.", *VAE)    # of what stands beside a network without prefix
V_PRED, ZERO_SNR = "v_pred", "ztsnr"    # empty tensors: AUTOMATIC1111/stable-diffusion-webui#16567 and #16569

# ---- text encoders


class Text(NamedTuple):
    """A text encoder of a family."""

    name: str
    prefix: str                                 # in a whole checkpoint
    config: type                                # CLIPTextConfig or T5Config
    fits: Callable[[Any, Any], bool]            # its config, the network's -> whether it is of the size that the network takes
    settings: Mapping[str, Any] = MappingProxyType({})      # fields of its config that its weights do not tell
    pad_token: str | None = None                # None: the tokenizer's own
    projection: str = ""                        # of its pooled feature: "" none, "own" in the weights, "identity" where they have none
    unused: int = 0                             # of open_clip's layers: these last ones are left out


OPENAI, LAION = {"activation": "quick_gelu"}, {"activation": "gelu"}
CLIP_L, BIG_G, T5 = "CLIP-L", "CLIP-bigG", "T5"


def _clip_l(prefix: str, fits: Callable[[Any, Any], bool], projection: str = "") -> Text:
    return Text(CLIP_L, prefix, CLIPTextConfig, fits, OPENAI, EOS, projection)


def _big_g(prefix: str, fits: Callable[[Any, Any], bool]) -> Text:
    return Text(BIG_G, prefix, CLIPTextConfig, fits, LAION, "!", "own")


_t5 = Text(T5, "text_encoders.t5xxl.", T5Config, lambda text, net: text.width == net.context_dim)
_alone = lambda text, net: text.width == net.context_dim

# Of two CLIPs, whose features stand side by side, CLIP-L is the narrower one.
_narrow_context, _wide_context = lambda text, net: 2 * text.width < net.context_dim, lambda text, net: 2 * text.width > net.context_dim
_narrow_pooled, _wide_pooled = lambda text, net: 2 * text.width < net.pooled_dim, lambda text, net: 2 * text.width > net.pooled_dim

_any = lambda text, net: True
_clip_h = Text("CLIP-H", "", CLIPTextConfig, _any, LAION, "!")
# CLIP's text encoders in files of their own, by width and number of layers. Stable Diffusion 2 has CLIP-H without its last layer. CLIP-L
# under the names of open_clip, of which the config tells gelu, may be OpenAI's or LAION's.
ALONE = {(768, 12): _clip_l("", lambda text, net: text.activation == OPENAI["activation"]), (1024, 23): _clip_h, (1024, 24): _clip_h,
         (1280, 32): _big_g("", _any)}


def alone(config: Any) -> Text | None:
    """What a text encoder in a file of its own is, by the config that its tensors tell; None where that is not known."""
    if isinstance(config, T5Config):
        return _t5
    text = ALONE.get((config.width, config.layers))
    return text if text and text.fits(config, None) else None


# ---- schedulers, as in the published scheduler_config.json

CURVE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
         "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "trained_betas": None}
DDIM = CURVE | {"_class_name": "DDIMScheduler"}
SD1 = CURVE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
EULER = CURVE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
FLOW = {"_class_name": pipelines.FLOW_MATCH, "num_train_timesteps": 1000, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096}
DEV, SCHNELL = {"shift": 3.0, "use_dynamic_shifting": True}, {"shift": 1.0, "use_dynamic_shifting": False}

# ---- families


class Family(NamedTuple):
    """A family of models. `network` is a key of NETWORKS, `pipeline` one of PIPELINES.

    mark          tensor of the network, without prefix, that every file of the family has
    known_by      shapes of the network's tensors by name -> whether it is this family, and not one further down with the same mark
    scaling       scaling and shift factor of the VAE
    scheduler     the network's config -> scheduler_config.json, without the prediction where that is not told by the family
    prediction    what the network predicts unless a file says otherwise
    sample_sizes  prediction -> height and width of the latents in training, where the weights do not tell them
    """

    name: str
    network: str
    pipeline: str
    mark: str
    texts: tuple[Text, ...]
    scaling: tuple[float, float]
    scheduler: Callable[[Any], Mapping[str, Any]]
    prediction: str
    known_by: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    sample_sizes: Mapping[str, int] = MappingProxyType({})

    @property
    def encoders(self) -> dict[str, Text]:
        """The text encoders by their folder in a model folder."""
        return dict(zip(pipelines.TEXT_FOLDERS, self.texts))


U_NET, LINEAR = "input_blocks.0.0.weight", "middle_block.1.proj_in.weight"
FAMILIES = (
    Family("Stable Diffusion XL", "unet", pipelines.SDXL, U_NET,
           (_clip_l("conditioner.embedders.0.", _narrow_context), _big_g("conditioner.embedders.1.", _wide_context)),
           (0.13025, 0.0), lambda net: EULER, "eps", lambda shapes: "label_emb.0.0.weight" in shapes, {"eps": 128, "v": 128}),
    Family("Stable Diffusion 2", "unet", pipelines.STABLE_DIFFUSION, U_NET,
           (Text("CLIP-H", "cond_stage_model.", CLIPTextConfig, _alone, LAION, "!", unused=1),),
           (0.18215, 0.0), lambda net: DDIM, "v", lambda shapes: len(shapes.get(LINEAR, ())) == 2, {"eps": 64, "v": 96}),
    Family("Stable Diffusion 1", "unet", pipelines.STABLE_DIFFUSION, U_NET, (_clip_l("cond_stage_model.", _alone),),
           (0.18215, 0.0), lambda net: SD1, "eps", sample_sizes={"eps": 64, "v": 64}),
    # The reference takes CLIP-L's pooled feature as it is, whatever a file holds (Stability-AI/sd3.5, return_projected_pooled).
    Family("Stable Diffusion 3", "mmdit", pipelines.SD3, "joint_blocks.0.context_block.attn.qkv.weight",
           (_clip_l("text_encoders.clip_l.", _narrow_pooled, "identity"), _big_g("text_encoders.clip_g.", _wide_pooled), _t5),
           (1.5305, 0.0609), lambda net: FLOW | {"shift": 3.0}, "flow"),
    Family("FLUX.1", "flux", pipelines.FLUX, "double_blocks.0.img_attn.qkv.weight",
           (_clip_l("text_encoders.clip_l.", lambda text, net: text.width == net.pooled_dim), _t5),
           (0.3611, 0.1159), lambda net: FLOW | (DEV if net.guidance else SCHNELL), "flow"),
)


class Recognised(NamedTuple):
    family: Family
    prefix: str                 # of the network's tensors


def find(shapes: Mapping[str, Shape]) -> Recognised | None:
    """The family of a checkpoint; None for a file without the network of one."""
    for prefix in (NETWORK, ""):
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if of_network(name, prefix)}
        for family in FAMILIES:
            if family.mark in own and family.known_by(own):
                return Recognised(family, prefix)
    return None


def of_network(name: str, prefix: str) -> bool:
    """Whether a tensor of a file whose network has this prefix is the network's."""
    return name.startswith(prefix) and (prefix != "" or not (name.startswith(BESIDE) or name in (V_PRED, ZERO_SNR)))


# ---- files that are no checkpoint of these families

_ABSENT = "whose network is not here"
_NOT_ONE = "draw with a checkpoint of Stable Diffusion 1, 2, XL, 3 or FLUX.1"
_OURS = rf"({re.escape(NETWORK)})?"
# Regex of a tensor's whole name -> what a file that holds it is, and what to do instead. The first that fits counts.
OTHERS = {
    r"(lora|lycoris)_.*|.*(\.|_)lora[._](A|B|down|up)\..*|.*\.(lora_linear_layer\..*|(hada|lokr)_[wt][12].*)":
        "a LoRA or its like, which changes another model: name that one with --model, and this file with --lora",
    r"control_model\..*|.*controlnet_(cond_embedding|down_blocks|blocks)\..*|control_net.*":
        "a ControlNet, which steers another model and draws nothing alone: load that model",
    r"conditioner\.embedders\.0\.model\..*":
        "Stable Diffusion XL's refiner, which finishes pictures that the base model has begun: draw with the base model alone",
    rf"{_OURS}.*\.(time_stack|time_mix_blocks)\..*": f"Stable Video Diffusion, which animates a picture: {_NOT_ONE}",
    r"edm_mean|edm_std": "Playground 2.5, trained with EDM's process and latents standardised per channel, which cannot be read here: "
                         "take Playground 2 or another Stable Diffusion XL",
    r"edm_vpred\.sigma_(max|min)": "a Stable Diffusion XL trained with EDM's continuous process (CosXL), which cannot be read here: "
                                   "take one that predicts eps or v",
    rf"{_OURS}(clip_txt_mapper|clip_mapper|clf\.1)\..*": f"Stable Cascade, {_ABSENT}: {_NOT_ONE}",
    rf"{_OURS}double_layers\.0\.attn\.w1q\.weight": f"AuraFlow, {_ABSENT}: {_NOT_ONE}",
    rf"{_OURS}t_block\.1\.weight": f"PixArt or Sana, {_ABSENT}: {_NOT_ONE}",
    rf"{_OURS}mlp_t5\.0\.weight": f"HunyuanDiT, {_ABSENT}: {_NOT_ONE}",
    rf"{_OURS}cap_embedder\.0\.weight": f"Lumina or Z-Image, {_ABSENT}: {_NOT_ONE}",
    rf"{_OURS}double_stream_blocks\.0\..*": f"HiDream, {_ABSENT}: {_NOT_ONE}",
    rf"{_OURS}txt_norm\.weight": f"Qwen-Image, {_ABSENT}: {_NOT_ONE}",
    rf"{_OURS}(head\.modulation|patchify_proj\.weight|blocks\.0\.attn\.qkv_x\.weight)": f"a video model (Wan, LTX or Mochi): {_NOT_ONE}",
    r"(unet\.)?(down_blocks\.0\.resnets|conv_norm_out)\..*|(transformer\.)?(single_)?transformer_blocks\.0\..*":
        "a network alone under diffusers' names, whose config is in another file: name the model folder that it belongs to",
}
# Channels that a network takes -> what it is, where it makes fewer.
MORE_INPUTS = {9: "an inpainting model, which also takes a mask and the masked picture: take the model that it was made from",
               8: "InstructPix2Pix or another that also takes the picture to change: take the model that it was made from",
               5: "a depth-guided model, which also takes a map of depths: take the model that it was made from"}


def other(names: Iterable[str]) -> str | None:
    """What a file with these tensors is, and what to do instead, for files in OTHERS; else None."""
    names = list(names)
    return next((what for pattern, what in OTHERS.items() if any(re.fullmatch(pattern, name) for name in names)), None)
