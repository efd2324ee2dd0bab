"""The names that diffusers gives alike to the weights of its transformers with two streams, Stable Diffusion 3's and FLUX.1's."""

from tinyldm.vendor_loaders.layout import Rules

# Outside the blocks. In the last modulation, diffusers has scale before shift.
AROUND: Rules = [
    (r"^context_in\.", "context_embedder."),
    (r"^time_in\.", "time_text_embed.timestep_embedder."),
    (r"^pooled_in\.0\.", "time_text_embed.text_embedder.linear_1."),
    (r"^pooled_in\.2\.", "time_text_embed.text_embedder.linear_2."),
    (r"^final_modulation\.(.*)", r"norm_out.linear.\1@swap"),
    (r"^patch_out\.", "proj_out."),
]

# In a block, only a part of a name tells the text's weights from the image's.
STREAMS: Rules = [
    (r"\.(attn2?)\.([qk])_norm\.", r".\1.norm_\2."),
    (r"\.image\.modulation\.", ".norm1.linear."),
    (r"\.image\.(attn2?)\.to_out\.", r".\1.to_out.0."),
    (r"\.image\.(attn2?)\.", r".\1."),
    (r"\.text\.modulation\.", ".norm1_context.linear."),
    (r"\.text\.attn\.to_([qkv])\.", r".attn.add_\1_proj."),
    (r"\.text\.attn\.to_out\.", ".attn.to_add_out."),
    (r"\.text\.attn\.norm_", ".attn.norm_added_"),
    (r"\.image\.mlp\.", ".ff.net."),
    (r"\.text\.mlp\.", ".ff_context.net."),
    (r"(\.ff|\.ff_context)\.net\.0\.", r"\1.net.0.proj."),
]
