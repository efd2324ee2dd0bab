"""Writes small models as diffusers publishes them: Stable Diffusion 1, 2 and XL, Stable Diffusion 3 and FLUX.1, with random weights of a good
scale and with tokenizers of their own.

Each function returns the pipeline of diffusers, which draws the pictures to compare with. Everything that a single-file checkpoint does
not state (the number of heads, the axes of rotary positions) has the published proportions, so that it can be told from the shapes.
"""

import functools
import tempfile
from pathlib import Path

import diffusers
import tokenizers as tk
import torch
import transformers
from helpers import PROMPT, randomise

from tinyldm.text.tokenizer import Tokenizer

NEGATIVE = "a small green triangle"
CLIP_LENGTH = 16
VAE = {"block_out_channels": (32, 64), "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


@functools.cache
def clip_tokenizer(pad_token: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train([PROMPT, NEGATIVE] * 3, vocab_size=600, context_length=CLIP_LENGTH, pad_token=pad_token).save(folder)
        return transformers.CLIPTokenizer.from_pretrained(folder)


@functools.cache
def t5_tokenizer() -> transformers.T5Tokenizer:
    """T5's tokenizer of some hundred pieces, with all 100 of its sentinels."""
    trained = tk.Tokenizer(tk.models.Unigram())
    trained.pre_tokenizer = tk.pre_tokenizers.Sequence([tk.pre_tokenizers.WhitespaceSplit(), tk.pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator([PROMPT, NEGATIVE, "The quick brown fox jumps over the lazy dog, 0123456789!"] * 3,
                                tk.trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False))
    pieces = [(piece, 0.0 if piece in special else -2.0 - 0.05 * i) for i, piece in
              enumerate(sorted(trained.get_vocab(), key=trained.get_vocab().get))]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return transformers.T5Tokenizer(vocab=pieces + sentinels, model_max_length=512)


def clip_text(width: int, layers: int, tokenizer, seed: int, projection: int | None = None, activation: str = "quick_gelu"):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=CLIP_LENGTH, hidden_act=activation, projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return randomise((transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config), seed)


def t5_text(width: int, seed: int):
    config = transformers.T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                                   feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return randomise(transformers.T5EncoderModel(config), seed)


@torch.no_grad()
def autoencoder(seed: int, **fields):
    """An autoencoder whose random pictures are neither grey nor much clipped."""
    vae = randomise(diffusers.AutoencoderKL(**VAE, **fields), seed)
    vae.decoder.conv_out.weight *= 0.35
    return vae


def _sixteen_channels(scaling: float, shift: float):
    return autoencoder(3, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scaling, shift_factor=shift)


def _written(pipeline, folder: Path | None):
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline


def write_sd(folder: Path | None, version: int = 1):
    """Stable Diffusion 1 or 2, which differ in how they enter transformers: by convolution or by Linear. Two levels."""
    linear, words = version == 2, clip_tokenizer("!" if version == 2 else "<|endoftext|>")
    net = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=linear)
    return _written(diffusers.StableDiffusionPipeline(
        vae=autoencoder(3, scaling_factor=0.18215), unet=randomise(net, 5), tokenizer=words,
        text_encoder=clip_text(64, 2, words, 1, activation="gelu" if linear else "quick_gelu"),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1, clip_sample=False,
            prediction_type="v_prediction" if linear else "epsilon"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False), folder)


def write_sdxl(folder: Path | None, prediction: str = "epsilon", layers: tuple[int, ...] = (1, 1, 2), **scheduler):
    """Three levels, the first without attention; the last has transformers of two blocks. scheduler: fields of its config."""
    words = [clip_tokenizer(), clip_tokenizer("!")]
    net = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 64, 128), layers_per_block=1, cross_attention_dim=192, attention_head_dim=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=layers,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=128 + 6 * 256)
    return _written(diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(3, scaling_factor=0.13025), unet=randomise(net, 5), tokenizer=words[0], tokenizer_2=words[1],
        text_encoder=clip_text(64, 2, words[0], 1),
        text_encoder_2=clip_text(128, 3, words[1], 2, projection=128, activation="gelu"),
        scheduler=diffusers.EulerDiscreteScheduler(**{
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1,
            "prediction_type": prediction} | scheduler), add_watermarker=False), folder)


def write_sd3(folder: Path | None, qk_norm: bool = False, dual: bool = False, t5: bool = True, identity: bool = False):
    """Two joint blocks, the first of them with dual attention where that is asked for. identity: CLIP-L's pooled feature is not projected,
    as in the single files, which hold no projection for it."""
    words = [clip_tokenizer(), clip_tokenizer("!")]
    net = diffusers.SD3Transformer2DModel(
        sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=64, joint_attention_dim=224, caption_projection_dim=128,
        pooled_projection_dim=192, pos_embed_max_size=12, qk_norm="rms_norm" if qk_norm else None,
        dual_attention_layers=(0,) if dual else ())
    first = clip_text(64, 2, words[0], 1, projection=64)
    if identity:
        torch.nn.init.eye_(first.text_projection.weight)
    return _written(diffusers.StableDiffusion3Pipeline(
        transformer=randomise(net, 5), vae=_sixteen_channels(1.5305, 0.0609), text_encoder=first, tokenizer=words[0],
        text_encoder_2=clip_text(128, 3, words[1], 2, projection=128, activation="gelu"), tokenizer_2=words[1],
        text_encoder_3=t5_text(224, 4) if t5 else None, tokenizer_3=t5_tokenizer() if t5 else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), folder)


def write_flux(folder: Path | None, guidance: bool = True, head_dim: int = 32):
    """Two double and two single blocks; dev where guidance is True, else schnell. head_dim 128 is the published one."""
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    net = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=head_dim, num_attention_heads=2, joint_attention_dim=160,
        pooled_projection_dim=64, guidance_embeds=guidance, axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16))
    return _written(diffusers.FluxPipeline(
        transformer=randomise(net, 5), vae=_sixteen_channels(0.3611, 0.1159), text_encoder=clip_text(64, 2, clip_tokenizer(), 1),
        tokenizer=clip_tokenizer(), text_encoder_2=t5_text(160, 4), tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **shift, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)), folder)


PIPELINES = {"sd1": lambda folder: write_sd(folder, 1), "sd2": lambda folder: write_sd(folder, 2), "sdxl": write_sdxl,
             "sd3": lambda folder: write_sd3(folder, qk_norm=True, dual=True), "flux": write_flux}
