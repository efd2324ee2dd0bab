"""The layouts in which models were first published: state dicts of diffusers and transformers under the original code's names.

Written without the package's rename rules: another account of the layouts, to test these with.
"""

from itertools import product

import torch


def compvis_unet(tensors, config):
    """diffusers' state dict under the names of the original code (sgm), which numbers blocks in the order in which they run.
    Written without the package's rules."""
    parts = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
             "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}
    levels = len(config.widths)
    number = 1
    for level in range(levels):
        for j in range(config.depth):
            parts[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{number}.0"
            parts[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        parts[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for i in range(levels):
        for j in range(config.depth + 1):
            parts[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            parts[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        place = 2 if config.attention[levels - 1 - i] else 1
        parts[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    renamed = {}
    for name, tensor in tensors.items():
        start = max((part for part in parts if name.startswith(part + ".")), key=len)
        rest = name.removeprefix(start + ".").split(".")
        rest[0] = inside.get(rest[0], rest[0]) if ".resnets." in start else rest[0]
        renamed[".".join([parts[start], *rest])] = tensor
    return renamed


def original_mmdit(tensors, layers, dual_layers):
    """A state dict of diffusers' as Stability writes it (sd3.5's mmditx.py): another account of the layout than the rename rules."""
    two = lambda name, to: {f"{to}.{kind}": tensors[f"{name}.{kind}"] for kind in ("weight", "bias")}
    swapped = lambda entries: {name: torch.cat([tensor[len(tensor) // 2:], tensor[:len(tensor) // 2]]) for name, tensor in entries.items()}

    def attention(names, norms, out, to):
        fused = {f"{to}.qkv.{kind}": torch.cat([tensors[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")}
        normed = {f"{to}.ln_{which}.weight": tensors[f"{name}.weight"] for which, name in zip("qk", norms) if f"{name}.weight" in tensors}
        return fused | normed | (two(out, f"{to}.proj") if out else {})

    found = {"pos_embed": tensors["pos_embed.pos_embed"], **two("pos_embed.proj", "x_embedder.proj"),
             **two("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
             **two("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
             **two("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
             **two("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
             **two("context_embedder", "context_embedder"), **two("proj_out", "final_layer.linear"),
             **swapped(two("norm_out.linear", "final_layer.adaLN_modulation.1"))}
    for i in range(layers):
        block, last = f"transformer_blocks.{i}", i == layers - 1
        image, text = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        for number in ("attn", "attn2") if i in dual_layers else ("attn",):
            own = f"{block}.{number}"
            found |= attention([f"{own}.to_{x}" for x in "qkv"], [f"{own}.norm_{x}" for x in "qk"], f"{own}.to_out.0", f"{image}.{number}")
        found |= attention([f"{block}.attn.add_{x}_proj" for x in "qkv"], [f"{block}.attn.norm_added_{x}" for x in "qk"],
                           None if last else f"{block}.attn.to_add_out", f"{text}.attn")
        found |= two(f"{block}.norm1.linear", f"{image}.adaLN_modulation.1")
        found |= two(f"{block}.ff.net.0.proj", f"{image}.mlp.fc1") | two(f"{block}.ff.net.2", f"{image}.mlp.fc2")
        text_modulation = two(f"{block}.norm1_context.linear", f"{text}.adaLN_modulation.1")
        found |= swapped(text_modulation) if last else text_modulation
        if not last:
            found |= two(f"{block}.ff_context.net.0.proj", f"{text}.mlp.fc1") | two(f"{block}.ff_context.net.2", f"{text}.mlp.fc2")
    return found


def original_flux(tensors, config):
    """A state dict of diffusers' as Black Forest Labs writes it (flux/model.py): another account of the layout than the rename rules."""
    both = ("weight", "bias")
    found = {}

    def put(to, *names):
        found.update({f"{to}.{kind}": torch.cat([tensors[f"{name}.{kind}"] for name in names]) for kind in both})

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    put("final_layer.linear", "proj_out")
    for to, name in (("time_in", "timestep"), ("vector_in", "text"), *([("guidance_in", "guidance")] if config.guidance else [])):
        put(f"{to}.in_layer", f"time_text_embed.{name}_embedder.linear_1")
        put(f"{to}.out_layer", f"time_text_embed.{name}_embedder.linear_2")
    for kind in both:                                                  # scale, shift -> shift, scale
        scale, shift = tensors[f"norm_out.linear.{kind}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(config.double_layers):
        theirs, block = f"transformer_blocks.{i}", f"double_blocks.{i}"
        put(f"{block}.img_mod.lin", f"{theirs}.norm1.linear")
        put(f"{block}.txt_mod.lin", f"{theirs}.norm1_context.linear")
        put(f"{block}.img_attn.qkv", *(f"{theirs}.attn.to_{x}" for x in "qkv"))
        put(f"{block}.txt_attn.qkv", *(f"{theirs}.attn.add_{x}_proj" for x in "qkv"))
        put(f"{block}.img_attn.proj", f"{theirs}.attn.to_out.0")
        put(f"{block}.txt_attn.proj", f"{theirs}.attn.to_add_out")
        for stream, mlp, norm in (("img", "ff", "norm"), ("txt", "ff_context", "norm_added")):
            put(f"{block}.{stream}_mlp.0", f"{theirs}.{mlp}.net.0.proj")
            put(f"{block}.{stream}_mlp.2", f"{theirs}.{mlp}.net.2")
            found[f"{block}.{stream}_attn.norm.query_norm.scale"] = tensors[f"{theirs}.attn.{norm}_q.weight"]
            found[f"{block}.{stream}_attn.norm.key_norm.scale"] = tensors[f"{theirs}.attn.{norm}_k.weight"]
    for i in range(config.single_layers):
        theirs, block = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        put(f"{block}.modulation.lin", f"{theirs}.norm.linear")
        put(f"{block}.linear1", *(f"{theirs}.attn.to_{x}" for x in "qkv"), f"{theirs}.proj_mlp")
        put(f"{block}.linear2", f"{theirs}.proj_out")
        found[f"{block}.norm.query_norm.scale"] = tensors[f"{theirs}.attn.norm_q.weight"]
        found[f"{block}.norm.key_norm.scale"] = tensors[f"{theirs}.attn.norm_k.weight"]
    return found


def open_clip(state):
    """The same weights as open_clip stores them, written down apart from the rename tables."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    tensors = {"token_embedding.weight": state["embeddings.token_embedding.weight"],
               "positional_embedding": state["embeddings.position_embedding.weight"],
               "ln_final.weight": state["final_layer_norm.weight"], "ln_final.bias": state["final_layer_norm.bias"],
               "text_projection": state["text_projection.weight"].T.contiguous()}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    for layer, kind in product(range(layers), ("weight", "bias")):
        of, to = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        tensors[f"{to}attn.in_proj_{kind}"] = torch.cat([state[f"{of}self_attn.{part}_proj.{kind}"] for part in "qkv"])
        for name, other in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                            ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
            tensors[f"{to}{other}.{kind}"] = state[f"{of}{name}.{kind}"]
    return tensors


def compvis_vae(tensors):
    """An autoencoder of diffusers' as CompVis' code (ldm's model.py) stores it, which counts the decoder's levels from the finest on."""
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    renamed = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        if words[1] in ("down_blocks", "up_blocks"):
            level = int(words[2]) if words[1] == "down_blocks" else levels - 1 - int(words[2])
            side = words[1].removesuffix("_blocks")
            words[1:3] = [side, str(level)]
            words[3:-1] = ["block", *words[4:-1]] if words[3] == "resnets" else [f"{side}sample", "conv"]
        elif words[1] == "mid_block":
            number = int(words[3])
            place = {"resnets": f"block_{number + 1}", "attentions": "attn_1"}[words[2]]
            inner = {"group_norm": ["norm"], "to_q": ["q"], "to_k": ["k"], "to_v": ["v"], "to_out": ["proj_out"]}.get(words[4], [words[4]])
            if words[4].startswith("to_"):
                tensor = tensor[:, :, None, None] if words[-1] == "weight" else tensor
            words = [words[0], "mid", place, *inner, words[-1]]
        words = [{"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}.get(word, word) for word in words]
        renamed[".".join(words)] = tensor
    return renamed


def open_clip_picture_tower(state):
    """transformers' picture tower of a CLIP as open_clip stores it, beside a text tower."""
    of, to = "vision_model.", "visual."
    tensors = {f"{to}class_embedding": state[f"{of}embeddings.class_embedding"],
               f"{to}conv1.weight": state[f"{of}embeddings.patch_embedding.weight"],
               f"{to}positional_embedding": state[f"{of}embeddings.position_embedding.weight"],
               f"{to}proj": state["visual_projection.weight"].T.contiguous(),
               "text_projection": torch.ones(2, 2), "logit_scale": torch.ones(())}
    for kind in ("weight", "bias"):
        tensors[f"{to}ln_pre.{kind}"], tensors[f"{to}ln_post.{kind}"] = (
            state[f"{of}{name}.{kind}"] for name in ("pre_layrnorm", "post_layernorm"))
    layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith(f"{of}encoder.layers."))
    for layer, kind in product(range(layers), ("weight", "bias")):
        old, new = f"{of}encoder.layers.{layer}.", f"{to}transformer.resblocks.{layer}."
        tensors[f"{new}attn.in_proj_{kind}"] = torch.cat([state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"])
        for name, other in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                            ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
            tensors[f"{new}{other}.{kind}"] = state[f"{old}{name}.{kind}"]
    return tensors


def meta_dinov2(state):
    """A DINOv2 of transformers' as Meta's own code stores it."""
    tensors = {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"],
               "mask_token": state["embeddings.mask_token"]}
    if "embeddings.register_tokens" in state:
        tensors["register_tokens"] = state["embeddings.register_tokens"]
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    for kind in ("weight", "bias"):
        tensors[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        tensors[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for layer in range(layers):
            old, new = f"encoder.layer.{layer}.", f"blocks.{layer}."
            fused = [state[f"{old}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            tensors[f"{new}attn.qkv.{kind}"] = torch.cat(fused)
            tensors[f"{new}attn.proj.{kind}"] = state[f"{old}attention.output.dense.{kind}"]
            for first, second in (("fc1", "fc1"), ("fc2", "fc2"), ("weights_in", "w12"), ("weights_out", "w3")):
                if f"{old}mlp.{first}.{kind}" in state:
                    tensors[f"{new}mlp.{second}.{kind}"] = state[f"{old}mlp.{first}.{kind}"]
            for i in (1, 2):
                tensors[f"{new}norm{i}.{kind}"] = state[f"{old}norm{i}.{kind}"]
                tensors[f"{new}ls{i}.gamma"] = state[f"{old}layer_scale{i}.lambda1"]
    return tensors


def timm_siglip(state):
    """A SigLIP picture tower of transformers' as open_clip stores it: timm's network inside. (transformers 5.5 has a prefix.)"""
    state = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
    to, head = "visual.trunk.", "head."
    tensors = {f"{to}pos_embed": state["embeddings.position_embedding.weight"][None], f"{to}attn_pool.latent": state[f"{head}probe"],
               "text.positional_embedding": torch.ones(2, 2), "logit_bias": torch.ones(())}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    for kind in ("weight", "bias"):
        tensors[f"{to}patch_embed.proj.{kind}"] = state[f"embeddings.patch_embedding.{kind}"]
        tensors[f"{to}norm.{kind}"] = state[f"post_layernorm.{kind}"]
        query, keys_and_values = state[f"{head}attention.in_proj_{kind}"].tensor_split([len(state[f"{head}layernorm.weight"])])
        tensors[f"{to}attn_pool.q.{kind}"], tensors[f"{to}attn_pool.kv.{kind}"] = query, keys_and_values
        for name, other in (("attention.out_proj", "proj"), ("layernorm", "norm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            tensors[f"{to}attn_pool.{other}.{kind}"] = state[f"{head}{name}.{kind}"]
        for layer in range(layers):
            old, new = f"encoder.layers.{layer}.", f"{to}blocks.{layer}."
            tensors[f"{new}attn.qkv.{kind}"] = torch.cat([state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"])
            for name, other in (("self_attn.out_proj", "attn.proj"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2"),
                                ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
                tensors[f"{new}{other}.{kind}"] = state[f"{old}{name}.{kind}"]
    return tensors
