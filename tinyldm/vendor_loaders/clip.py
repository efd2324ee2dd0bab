"""CLIP's text tower in the transformers layout (`text_encoder/` of a diffusers folder).

CLIP_RULES turns our parameter names into published ones, applied in order with re.sub. Published files carry
the `text_model.` prefix; transformers 5 leaves it out for a CLIPTextModel made there, and keeps it for one
loaded from a file that had it. A whole CLIPModel file also holds `vision_model.*`, `visual_projection.*` and
`logit_scale`, and old files hold `position_ids`.
"""

from __future__ import annotations

from tinyldm.models.clip_text import ACTIVATIONS, CLIPTextConfig

CLIP_RULES = [
    (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
    (r"^layers\.(\d+)\.", r"text_model.encoder.layers.\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.(q|k|v|out)\.", r".self_attn.\1_proj."),
    (r"\.(fc[12])\.", r".mlp.\1."),
    (r"^final_norm\.", "text_model.final_layer_norm."),
    (r"^projection\.", "text_projection."),
]

# ours -> published, and the value that transformers assumes where config.json is silent
FIELDS = {
    "vocab_size": ("vocab_size", 49408),
    "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "mlp_width": ("intermediate_size", 2048),
    "context_length": ("max_position_embeddings", 77),
    "activation": ("hidden_act", "quick_gelu"),
    "bos_token_id": ("bos_token_id", 49406),
    "eos_token_id": ("eos_token_id", 49407),
    "pad_token_id": ("pad_token_id", 1),
    "norm_eps": ("layer_norm_eps", 1e-5),
}


def to_config(config: CLIPTextConfig) -> dict:
    """The config.json with which transformers opens the model: CLIPTextModel, or ...WithProjection."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **{published: getattr(config, ours) for ours, (published, _) in FIELDS.items()},
        "projection_dim": config.projection_dim or config.width,    # unused without projection; must be a number
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }


def from_config(config: dict) -> CLIPTextConfig:
    """A published config.json -> ours. Reads CLIPTextModel's, CLIPTextModelWithProjection's and CLIPModel's.

    The pad id is the tokenizer's business: published configs often state one that nobody pads with.
    """
    architecture = (config.get("architectures") or ["CLIPTextModel"])[0]
    text = config.get("text_config") or config
    values = {ours: text.get(published, default) for ours, (published, default) in FIELDS.items()}
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {values['activation']!r} is unknown: CLIP text encoders use "
                         f"{' or '.join(ACTIVATIONS)}")
    projected = architecture in ("CLIPTextModelWithProjection", "CLIPModel")
    return CLIPTextConfig(**values, projection_dim=config.get("projection_dim", 512) if projected else None)
