"""Loading whole models of several hundred MB, with several text encoders and weights in shards, takes their memory and hardly more."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, small_text
from hollow import hollow
from small_models import mmdit_model

from tinyldm.folders.rename import published_shapes
from tinyldm.folders.save import save_model
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.mmdit import MMDiT, MMDiTConfig

MEASURE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from contextlib import nullcontext
from pretend_gpu import GPU, PretendGpu
from tinyldm.folders.load import load_model
from tinyldm.offload import offload, pinned_weights, weight_bytes

def memory(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

pinned = sys.argv[2] == "pinned"
load_model(Path(sys.argv[1]).with_name("small"))        # imports what is needed
with PretendGpu() if pinned else nullcontext():
    Path("/proc/self/clear_refs").write_text("5")       # the peak starts from here
    before = memory("VmRSS")
    with pinned_weights(GPU) if pinned else nullcontext():
        model = load_model(sys.argv[1])
    if pinned:
        offload(model, GPU, "blocks")
    assert pinned == all(p.is_pinned() for p in model.net.parameters())
    print(memory("VmHWM") - before, sum(map(weight_bytes, model.modules.values())))
"""


def write_large(folder: Path, module: torch.nn.Module, shards: int = 1) -> None:
    """Replace a part of a model folder by a larger network of zeros, in shards."""
    row = architecture(module)
    layout = next(iter(row.layouts.values()))
    shapes = published_shapes(module.state_dict(), layout.rules(module.config))
    (folder / "config.json").write_text(json.dumps(row.to_config(module.config)))
    (folder / f"{row.stem}.safetensors").unlink()
    names = {f"{row.stem}-{i:05d}-of-{shards:05d}.safetensors": [*shapes][i::shards] for i in range(shards)}
    for name, inside in names.items():
        hollow(folder / name, {tensor: shapes[tensor] for tensor in inside})
    index = {"weight_map": {tensor: name for name, inside in names.items() for tensor in inside}}
    (folder / f"{row.stem}.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network in three shards and two text encoders in two each, 560 MB in all."""
    path, model = tmp_path_factory.mktemp("models") / "large", mmdit_model()
    save_model(path, net=model.net, vae=model.vae, texts=[module for module, _ in model.text.encoders[:2]], scheduler=model.scheduler,
               tokenizers=model.text.tokenizers[:2], defaults={"text_join": "sdxl"})
    shutil.copytree(path, path.with_name("small"))
    tokenizer, small = small_text()
    text = CLIPTextConfig(vocab_size=len(tokenizer), width=768, layers=4, heads=12, context_length=16, projection_dim=768,
                          bos_token_id=small.bos_token_id, eos_token_id=small.eos_token_id)
    with torch.device("meta"):
        write_large(path / "transformer", MMDiT(MMDiTConfig(width=512, layers=8, heads=8, context_dim=1536, pooled_dim=768,
                                                            max_positions=12, sample_size=8)), shards=3)
        for name in ("text_encoder", "text_encoder_2"):
            write_large(path / name, CLIPText(text), shards=2)
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [pytest.param("ordinary", marks=pytest.mark.slow), "pinned"])
def test_shards_and_several_encoders_take_the_memory_of_the_model_and_hardly_more(folder, how):
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, how], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
                          check=False)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > 400e6 and size < peak < 1.15 * size
