"""T5's encoder as transformers publishes it, in a folder or as one file (t5xxl_fp16.safetensors), with or without the decoder.

The embedding has one of two names, or both, for the same numbers: `shared.weight`, because the decoder shares it, and
`encoder.embed_tokens.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tinyldm.models.t5 import T5Config
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape, count_blocks

FIRST = "encoder.block.0.layer."
BIAS = r"SelfAttention.relative_attention_bias.weight"
CLASSES = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")      # the last: an old name of the second
MODEL_TYPE = "t5"
BESIDE = r"^(decoder\..*|lm_head\.weight|spiece_model)$"        # ComfyUI stores the tokenizer's file as a tensor


def rules(config: T5Config) -> Rules:
    return [
        (r"^token_embedding\.", "shared."),
        (r"^position_bias\.weight$", f"{FIRST}0.{BIAS}"),
        (r"^layers\.(\d+)\.(q|k|v)\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
        (r"^layers\.(\d+)\.out\.", r"encoder.block.\1.layer.0.SelfAttention.o."),
        (r"^layers\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^layers\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
        (r"^layers\.(\d+)\.fc1\.", rf"encoder.block.\1.layer.1.DenseReluDense.{'wi_0' if config.gated else 'wi'}."),
        (r"^layers\.(\d+)\.gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^layers\.(\d+)\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
        (r"^final_norm\.", "encoder.final_layer_norm."),
    ]


def infer(shapes: Mapping[str, Shape]) -> T5Config:
    """The config of weights without a config.json. ValueError for UMT5's."""
    if f"encoder.block.1.layer.0.{BIAS}" in shapes:
        raise ValueError("it is UMT5's encoder, which has position biases in every layer: of this family, only T5's can be read")
    vocab_size, width = next(shapes[name] for name in ("shared.weight", "encoder.embed_tokens.weight") if name in shapes)
    buckets, heads = shapes[f"{FIRST}0.{BIAS}"]
    gated = f"{FIRST}1.DenseReluDense.wi_0.weight" in shapes
    return T5Config(
        vocab_size=vocab_size, width=width, heads=heads, buckets=buckets, gated=gated,
        layers=count_blocks(shapes, r"encoder\.block\.(\d+)\."),
        head_dim=shapes[f"{FIRST}0.SelfAttention.q.weight"][0] // heads,
        mlp_width=shapes[f"{FIRST}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0])


LAYOUTS = {
    "transformers": Layout(r"((?:.*\.)?)shared\.weight", rules,
                           lambda config: [(BESIDE, ""), (r"^encoder\.embed_tokens\.weight$", "")], infer),
    "encoder": Layout(r"((?:.*\.)?)encoder\.embed_tokens\.weight", lambda config: [
        (r"^token_embedding\.", "encoder.embed_tokens."), *rules(config)], lambda config: [(BESIDE, "")], infer),
}

# our field -> the published field, and the value that transformers assumes for a config.json without it
FIELDS = {
    "vocab_size": ("vocab_size", 32128),
    "width": ("d_model", 512),
    "layers": ("num_layers", 6),
    "heads": ("num_heads", 8),
    "head_dim": ("d_kv", 64),
    "mlp_width": ("d_ff", 2048),
    "context_length": ("n_positions", 512),         # of no effect in transformers
    "eos_token_id": ("eos_token_id", 1),
    "buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
}
MLPS = {"relu": False, "gated-gelu": True, "gated-gelu_new": True}      # feed_forward_proj -> whether it is gated
STATED = {"dense_act_fn": ("relu", "gelu_new"), "is_gated_act": (False, True)}     # what newer configs say besides: not gated, gated


def to_config(config: T5Config) -> dict:
    """The config.json with which transformers opens the encoder as T5EncoderModel."""
    return {
        "architectures": [CLASSES[0]],
        "model_type": MODEL_TYPE,
        **{published: getattr(config, ours) for ours, (published, _) in FIELDS.items()},
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        **{name: values[config.gated] for name, values in STATED.items()},
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "tie_word_embeddings": not config.gated,    # as in published configs; of the decoder
        "dropout_rate": 0.0,
        "initializer_factor": 1.0,
    }


def from_config(config: dict) -> T5Config:
    """A published config.json of T5's encoder, or of the whole T5 -> our config. ValueError for relatives that differ."""
    name, kind = (config.get("architectures") or CLASSES)[0], config.get("model_type", MODEL_TYPE)
    if name not in CLASSES or kind != MODEL_TYPE:
        reason = ", which has position biases in every layer" if "UMT5" in name or kind == "umt5" else ""
        raise ValueError(f"config.json describes a {name if name not in CLASSES else kind}{reason}: of this family, only T5's encoder "
                         f"({', '.join(CLASSES)}) can be read")
    mlp = config.get("feed_forward_proj", "relu")
    gated = MLPS.get(mlp)
    odd = [f"{field}={config[field]!r}" for field, values in STATED.items() if field in config and config[field] != values[bool(gated)]]
    if gated is None or odd:
        raise ValueError(f"the config says {', '.join([f'feed_forward_proj={mlp!r}', *odd])}: T5 has relu, or gated-gelu (dense_act_fn "
                         f"gelu_new, is_gated_act true)")
    return T5Config(**{ours: config.get(published, default) for ours, (published, default) in FIELDS.items()}, gated=gated)
