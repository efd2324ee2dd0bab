"""T5's encoder in the forms in which it is published, against transformers, live."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import randomise, thinned
from safetensors.torch import load_file, save_file

from tinyldm.folders.build import load_network, load_weights
from tinyldm.folders.load import load_text
from tinyldm.folders.rename import apply, export_renamed, published_shapes, recognise
from tinyldm.folders.save import write_part
from tinyldm.folders.weights import Weights, open_weights
from tinyldm.models.t5 import T5, T5Config
from tinyldm.vendor_loaders.t5 import LAYOUTS, from_config, to_config

CONFIG = T5Config(vocab_size=100, width=48, layers=3, heads=4, head_dim=8, mlp_width=64, context_length=40)
ORIGINAL = replace(CONFIG, gated=False)
IDS = torch.randint(2, 100, (3, 20), generator=torch.Generator().manual_seed(0))
IDS[:, 15] = 1


@torch.no_grad()
def published(config, kind=transformers.T5EncoderModel):
    theirs = randomise(kind(transformers.T5Config(**to_config(config) | {"is_encoder_decoder": kind is not transformers.T5EncoderModel})))
    theirs.shared.weight *= config.width**0.5
    return theirs


def features(theirs):
    return theirs.get_encoder()(IDS).last_hidden_state if hasattr(theirs, "decoder") else theirs(IDS).last_hidden_state


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", [transformers.T5EncoderModel, transformers.T5ForConditionalGeneration, transformers.T5Model])
@pytest.mark.parametrize("config", [CONFIG, ORIGINAL], ids=["v1.1", "original"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["one file", "shards"])
def test_a_folder_that_transformers_wrote_loads_without_its_decoder(tmp_path, config, kind, shard):
    theirs = published(config, kind)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = load_text(tmp_path)
    assert isinstance(ours, T5) and ours.config == config
    assert_close(ours(IDS).hidden, features(theirs))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer.", "model."])
@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")],
                         ids=["shared", "own", "both"])
@pytest.mark.parametrize("config", [CONFIG, ORIGINAL], ids=["v1.1", "original"])
def test_one_file_tells_its_config_whatever_it_calls_the_embedding(tmp_path, prefix, names, config):
    theirs = published(config)
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if "embed_tokens" not in name and "shared" not in name}
    tensors |= {f"{name}.weight": theirs.shared.weight.detach().clone() for name in names}
    beside = {"text_encoders.t5xxl.logit_scale": torch.ones(1)} if prefix else {}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()} | beside
    save_file(tensors | {f"{prefix}spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "t5xxl_fp16.safetensors")
    weights = open_weights(tmp_path / "t5xxl_fp16.safetensors")
    layout, own = recognise(weights, LAYOUTS)
    told = layout.config_of(own.shapes)
    assert told == replace(config, context_length=T5Config.context_length)
    assert_close(load_network(T5, told, weights, "cpu", torch.float32)(IDS).hidden, features(theirs))


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_stored_numbers_of_fewer_bits_are_cast_while_they_are_read(tmp_path, stored):
    theirs = published(CONFIG)
    tensors = {name: t.to(stored) for name, t in theirs.state_dict().items() if "embed_tokens" not in name}
    save_file(tensors, tmp_path / "t5xxl.safetensors")
    ours = T5(CONFIG)
    load_weights(ours, tmp_path / "t5xxl.safetensors")
    theirs.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    assert_close(ours(IDS).hidden, features(theirs))


@torch.no_grad()
def test_what_is_written_opens_in_transformers_with_the_same_features(tmp_path):
    for config in (CONFIG, ORIGINAL):
        ours = randomise(T5(config))
        write_part(tmp_path / str(config.gated), ours)
        theirs, report = transformers.T5EncoderModel.from_pretrained(tmp_path / str(config.gated), output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert_close(ours(IDS).hidden, features(theirs))
        assert load_text(tmp_path / str(config.gated)).config == config
        assert load_file(tmp_path / str(config.gated) / "model.safetensors").keys() == export_renamed(ours.state_dict(), LAYOUTS[
            "transformers"].rules(config)).keys()


SIZES = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32),
         "xxl": (4096, 10240, 24, 64)}


@pytest.mark.parametrize("size", thinned(4, SIZES))
def test_every_tensor_of_version_1_1_has_its_place_and_every_place_its_tensor(size):
    width, mlp, layers, heads = SIZES[size]
    said = {"d_model": width, "d_ff": mlp, "num_layers": layers, "num_heads": heads, "d_kv": 64, "feed_forward_proj": "gated-gelu",
            "vocab_size": 32128, "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    with torch.device("meta"):
        whole = transformers.T5ForConditionalGeneration(transformers.T5Config(**said)).state_dict()
        ours = T5(config := from_config(said))
    layout, weights = recognise(Weights.of(whole), LAYOUTS)
    assert layout is LAYOUTS["transformers"]
    tidied = weights.renamed(lambda name: apply(layout.tidy(config), name)).shapes
    assert published_shapes(ours.state_dict(), layout.rules(config)) == tidied
    left = {name for name in whole if name not in tidied}
    assert left == {name for name in whole if name.startswith("decoder.")} | {"lm_head.weight", "encoder.embed_tokens.weight"}
    assert len(tidied) == 9 * layers + 3 and layout.config_of(weights.shapes) == config
    assert size != "xxl" or config == T5Config()


def test_configs_survive_the_round_trip_and_an_absent_field_means_the_default_of_transformers():
    for config in (T5Config(), CONFIG, ORIGINAL, replace(CONFIG, buckets=16, max_distance=99, norm_eps=1e-5, eos_token_id=3)):
        assert from_config(json.loads(json.dumps(to_config(config)))) == config
    assert from_config({}) == from_config(json.loads(json.dumps(transformers.T5Config().to_dict())))
    assert from_config({"architectures": ["T5WithLMHeadModel"], "n_positions": 512}) == from_config({})        # t5-small's old config


@pytest.mark.parametrize("config, reason", [
    ({"architectures": ["UMT5EncoderModel"], "model_type": "umt5"}, "a UMT5EncoderModel, which has position biases in every layer"),
    ({"model_type": "umt5"}, "describes a umt5, which has position biases"),
    ({"architectures": ["LongT5EncoderModel"], "model_type": "longt5"}, "only T5's encoder"),
    ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu': T5 has relu, or gated-gelu"),
    ({"feed_forward_proj": "gelu"}, "feed_forward_proj='gelu'"),
    ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}, "dense_act_fn='relu'"),
    ({"feed_forward_proj": "relu", "is_gated_act": True}, "is_gated_act=True"),
])
def test_relatives_that_compute_something_else_are_refused_with_the_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        from_config(config)


def test_the_weights_of_umt5_alone_are_refused_with_the_reason():
    with torch.device("meta"):
        weights = transformers.UMT5EncoderModel(transformers.UMT5Config(
            d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=50)).state_dict()
    layout, own = recognise(Weights.of(weights), LAYOUTS)
    with pytest.raises(ValueError, match="UMT5's encoder, which has position biases in every layer"):
        layout.config_of(own.shapes)


# ---- memory

MEASURE = """
import sys, torch
from pathlib import Path
from tinyldm.folders.load import load_text

def memory(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.ones(8).sum()
Path("/proc/self/clear_refs").write_text("5")           # the peak starts from here
before = memory("VmRSS")
net = load_text(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(memory("VmHWM") - before, sum(p.nbytes for p in net.parameters()))
"""


def hole(file, shapes):
    """A safetensors file of float16 zeros that take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_loading_takes_the_memory_of_the_encoder_and_hardly_more(tmp_path, shards, dtype):
    config = T5Config(vocab_size=8192, width=1024, layers=10, heads=16, mlp_width=2816)
    with torch.device("meta"):
        shapes = published_shapes(T5(config).state_dict(), LAYOUTS["transformers"].rules(config))
    (tmp_path / "config.json").write_text(json.dumps(to_config(config)))
    if shards == 1:
        hole(tmp_path / "model.safetensors", shapes)
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        for i, file in enumerate(names):
            hole(tmp_path / file, dict([*shapes.items()][i::shards]))
        places = {name: names[j % shards] for j, name in enumerate(shapes)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    peak, size = map(int, subprocess.run([sys.executable, "-c", MEASURE, tmp_path, dtype], capture_output=True, text=True, check=True,
                                         cwd=Path(__file__).parents[2]).stdout.split())
    assert size > 250e6 and size < peak < 1.15 * size
