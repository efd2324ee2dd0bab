import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import thinned
from hollow import hollow
from safetensors.torch import save, save_file

from tinyldm.folders.rename import load_renamed
from tinyldm.folders.weights import Weights, choose, errors_about, find_weights, mapped_weights, open_weights, write_weights

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.randn(300), "ids": torch.arange(4), "scalar": torch.tensor(2.0)}
INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TorchScript")


def read(weights):
    return {name: tensor.clone() for name, tensor in weights.stream()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def pickled(content, **options):
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def refusal(action, *args):
    with pytest.raises(ValueError) as error:
        action(*args)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


# ---- what is read


@pytest.mark.parametrize("name, content", [
    ("x.safetensors", save(TENSORS)),
    ("x.ckpt", pickled(TENSORS)),
    ("x.bin", pickled(TENSORS, _use_new_zipfile_serialization=False)),
    ("x.pt", pickled({"state_dict": TENSORS, "global_step": 5, "lr": 0.1, "note": "text", "nested": {"x": [1]}})),
    ("x.pth", pickled({"epoch": 1, "state_dict": {"state_dict": TENSORS, "global_step": 5, "lr": 0.1}})),
    ("x.ckpt", pickled({name: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) for name, t in TENSORS.items()})),
], ids=lambda value: value if isinstance(value, str) else "file")
def test_tensors_are_read_with_their_names_shapes_and_dtypes_from_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    weights = open_weights(tmp_path / name)
    assert equal(read(weights), TENSORS) and equal(read(weights), TENSORS)              # twice
    assert weights.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()}
    assert ("global_step" in weights.facts) == (name in ("x.pt", "x.pth")) and weights.facts.get("global_step", 5) == 5


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one(tmp_path, kind):
    names = {name: f"model-{i:05}-of-00004.{kind}" for i, name in enumerate(TENSORS, 1)}
    for name, file in names.items():
        (tmp_path / file).write_bytes(save({name: TENSORS[name]}) if kind == "safetensors" else pickled({name: TENSORS[name]}))
    (tmp_path / f"model.{kind}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    assert equal(read(open_weights(find_weights(tmp_path, "model"))), TENSORS)


@pytest.mark.parametrize("names, variant, chosen", [
    ("m.safetensors m.bin m.fp16.safetensors m.non_ema.safetensors", None, "m.safetensors"),
    ("m.safetensors m.fp16.safetensors m.fp16.bin", "fp16", "m.fp16.safetensors"),
    ("m.bin m.fp16.safetensors m.fp16.bin", None, "m.fp16.safetensors"),
    ("m.bin m.fp16.bin m.ckpt", None, "m.bin"),
    ("m.safetensors m.safetensors.index.json", None, "m.safetensors"),
    ("m.bin m.safetensors.index.json m-00001-of-00002.safetensors", None, "m.safetensors.index.json"),
    ("m.safetensors.index.fp16.json m.safetensors.index.json", "fp16", "m.safetensors.index.fp16.json"),
    ("m.fp16.safetensors.index.json m.safetensors", "fp16", "m.fp16.safetensors.index.json"),
    ("m.bin.index.json", None, "m.bin.index.json"),
    ("m.safetensors", "fp16", None), ("m.non_ema.safetensors other.safetensors m.msgpack", None, None), ("", None, None),
])
def test_one_file_is_chosen_among_twins(names, variant, chosen):
    assert choose(set(names.split()), "m", variant) == chosen


def test_only_the_tensors_that_keep_a_name_are_read_from_the_disk(tmp_path, tensors_read):
    for number, names in enumerate((["a", "b.weight"], ["ids", "scalar"])):
        save_file({name: TENSORS[name] for name in names}, tmp_path / f"{number}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: f"{name in ('ids', 'scalar'):d}.safetensors" for name in TENSORS}}))
    part = open_weights(tmp_path / INDEX).renamed(lambda name: {"b.weight": "b", "ids": "i"}.get(name, "")).renamed(
        lambda name: f"vae.{name}" if name == "b" else "")
    assert tensors_read == [] and equal(read(part), {"vae.b": TENSORS["b.weight"]}) and tensors_read == ["b.weight"]


def test_of_scales_beside_float8_only_those_of_the_part_are_read(tmp_path, tensors_read):
    stored = {f"{part}.{name}": tensor for part in ("net", "text") for name, tensor in {
        "weight": torch.randn(3, 5).to(torch.float8_e4m3fn), "scale_weight": torch.tensor(0.5), "bias": torch.ones(3)}.items()}
    save_file(stored, tmp_path / "x.safetensors")
    part = open_weights(tmp_path / "x.safetensors").renamed(lambda name: name if name.startswith("text.") else "")
    assert read(part)["text.weight"].equal(stored["text.weight"].float() * 0.5)
    assert sorted(tensors_read) == ["text.bias", "text.scale_weight", "text.weight"]


# ---- damage


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 60, -300, -1])
def test_a_safetensors_file_that_is_cut_short_is_named(tmp_path, cut):
    (file := tmp_path / "x.safetensors").write_bytes(save(TENSORS)[:cut])
    text = refusal(open_weights, file)
    assert f"{file} is damaged" in text and "download it again" in text


@pytest.mark.parametrize("kind", ["cut short", "flipped", "garbage", "page"])
def test_a_damaged_pickle_is_an_error_of_one_line_whatever_is_wrong_with_it(tmp_path, kind):
    file, rng = tmp_path / "x.ckpt", random.Random(0)
    for whole in (pickled(TENSORS), pickled(TENSORS, _use_new_zipfile_serialization=False)):
        for i in range(40):
            content = {"cut short": whole[:rng.randrange(len(whole) - 1200)], "garbage": rng.randbytes(i),
                       "page": b"<html>\n<body>Not found" * i}.get(kind)
            if content is None:
                content = bytearray(whole)
                for _ in range(20):
                    content[rng.randrange(1000)] = rng.randrange(256)
            file.write_bytes(content)
            try:
                open_weights(file)
            except ValueError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                assert "damaged" in str(error) or "more than tensors" in str(error) and kind != "garbage"
            else:
                assert kind == "flipped"


class Code:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("wrap", [lambda code: {"a": code}, lambda code: {"state_dict": TENSORS, "extra": [code]}, lambda code: code])
@pytest.mark.parametrize("dump", [pickled, lambda content: pickled(content, _use_new_zipfile_serialization=False),
                                  pickle.dumps, lambda content: pickle.dumps(content, protocol=2)])
@pytest.mark.parametrize("name", ["x.ckpt", "x.bin"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, name, dump, wrap):
    (file := tmp_path / name).write_bytes(dump(wrap(Code(target := tmp_path / "created"))))
    text = refusal(open_weights, file)
    assert str(file) in text and not target.exists()
    if dump is pickled:
        assert "is refused" in text and "could run code" in text and ".safetensors" in text and "open" in text
    pickle.loads(pickle.dumps(Code(target))).close()                    # the bomb is a real one
    assert target.exists()


def test_a_torchscript_archive_a_module_and_a_list_are_refused(tmp_path):
    file = tmp_path / "x.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    assert f"{file} is refused" in (text := refusal(open_weights, file)) and "TorchScript" in text
    torch.save(torch.nn.Linear(2, 2), file)
    assert "torch.nn.modules.linear.Linear" in refusal(open_weights, file)
    torch.save([torch.ones(2)], file)
    assert f"{file} holds a list" in refusal(open_weights, file)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_a_pointer_of_git_lfs_says_what_to_run(tmp_path, name):
    (file := tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert f"{file} is a git-lfs pointer" in (text := refusal(open_weights, file)) and "git lfs pull" in text
    file.unlink()
    assert f"{file} does not exist" in refusal(open_weights, file)
    file.mkdir()
    assert f"{file} does not exist" in refusal(open_weights, file)


@pytest.mark.parametrize("index, expected", [
    ({"weight_map": {"a": "../x.safetensors"}}, "../x.safetensors, which is not a weights file beside it"),
    ({"weight_map": {"a": "/x.safetensors"}}, "/x.safetensors, which is not"), ({"weight_map": {"a": ".."}}, ".., which is not"),
    ({"weight_map": {"a": INDEX}}, f"{INDEX}, which is not"), ({"weight_map": {"a": 5}}, "5, which is not"),
    ({"weight_map": {"a": "one.safetensors", "b": "lost.safetensors"}}, "lost.safetensors does not exist"),
    ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "lists 1 tensors that no shard holds (b)"),
    ({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}, "two.safetensors holds 1 tensors of an earlier shard (a)"),
    ({"weight_map": ["a"]}, "is damaged"), ({}, "is damaged"), ([], "is damaged"), ("{", "is damaged"), ({"weight_map": {"a": [1]}}, "which is not"),
])
def test_an_index_that_lies_is_refused(tmp_path, index, expected):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (tmp_path / "x.safetensors", folder / "one.safetensors"):
        save_file({"a": torch.ones(1)}, file)
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, folder / "two.safetensors")
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    text = refusal(open_weights, folder / INDEX)
    assert expected in text and str(folder) in text


def test_two_names_that_become_one_are_refused():
    weights = Weights.of({"x.query.weight": torch.ones(1), "x.to_q.weight": torch.ones(1)})
    text = refusal(weights.renamed, lambda name: name.replace("query", "to_q"))
    assert "x.query.weight and x.to_q.weight are the same tensor x.to_q.weight twice" in text
    assert read(weights.renamed(lambda name: "" if "query" in name else name)).keys() == {"x.to_q.weight"}


# ---- memory

MEASURE = """
import sys, torch
from pathlib import Path
from tinyldm.folders.load import load_part
from tinyldm.model import NETWORKS

def memory(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")           # the peak starts from here
before = memory("VmRSS")
net = load_part(Path(sys.argv[1]), [NETWORKS["unet"]], "cpu", getattr(torch, sys.argv[2]))
print(memory("VmHWM") - before, sum(p.nbytes for p in net.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored, dtype", thinned(2, [("F32", "bfloat16"), ("F32", "float32")]))
def test_loading_takes_the_memory_of_the_network_and_hardly_more(tmp_path, stored, dtype):
    from tinyldm.folders.rename import published_shapes
    from tinyldm.models.unet import UNet, UNetConfig
    from tinyldm.vendor_loaders import unet

    config = UNetConfig(widths=(112, 224, 448, 448), groups=16)
    with torch.device("meta"):
        shapes = published_shapes(UNet(config).state_dict(), unet.UNET_RULES)
    hollow(tmp_path / "diffusion_pytorch_model.safetensors", shapes, stored)
    (tmp_path / "config.json").write_text(json.dumps(unet.to_config(config)))
    peak, size = map(int, subprocess.run([sys.executable, "-c", MEASURE, tmp_path, dtype], capture_output=True, text=True,
                                         check=True, cwd=Path(__file__).parents[2]).stdout.split())
    assert size > 200e6 and size < peak < (1.15 * size if dtype == "float32" else 1.15 * size + 64 * 2**20)


def test_weights_are_written_where_permissions_cannot_be_changed(tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(1, "Operation not permitted", str(self))

    write_weights(tmp_path / "usual.safetensors", TENSORS)
    umask = os.umask(0)
    os.umask(umask)
    assert os.name == "nt" or (tmp_path / "usual.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    monkeypatch.setattr(Path, "chmod", refuse)                  # as CIFS and mounts of object stores do
    write_weights(tmp_path / "model.safetensors", TENSORS)
    assert equal(read(open_weights(tmp_path / "model.safetensors")), TENSORS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_a_lack_of_memory_is_not_reported_as_a_damaged_file(error):
    with pytest.raises(type(error)) as raised, errors_about("model"):
        raise error
    assert raised.value is error
    with pytest.raises(ValueError, match="model: its config holds a value that makes no network"), errors_about("model"):
        raise RuntimeError("shapes do not fit")


# ---- weights that stay in the file


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_mapped_weights_are_the_file_s_own_memory_and_changes_do_not_reach_it(tmp_path, suffix):
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64).half())
    file, same = tmp_path / f"model.{suffix}", dict(net.state_dict())
    (save_file if suffix == "safetensors" else torch.save)(same, file)
    before = file.read_bytes()
    with torch.device("meta"):
        copied, mapped = (torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)) for _ in range(2))
    load_renamed(copied, open_weights(file), [])
    with mapped_weights():
        load_renamed(mapped, open_weights(file), [])
    for one, two in zip(copied.parameters(), mapped.parameters(), strict=True):
        assert torch.equal(one, two) and one.dtype == two.dtype == torch.float32
    if sys.platform == "linux":
        maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
        inside = lambda tensor: any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in maps)
        assert inside(mapped[0].weight) and not inside(mapped[1].weight)        # the latter is in half precision in the file
        assert not inside(copied[0].weight)
    with torch.no_grad():
        mapped[0].weight.zero_()
    assert file.read_bytes() == before and not mapped[0].weight.any()


# ---- weights in 8 bits and less


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_every_finite_number_of_8_bits_comes_out_in_bfloat16_as_itself(tmp_path, dtype, name):
    octets = torch.arange(256, dtype=torch.uint8)
    numbers = octets[octets.view(dtype).float().isfinite()].view(dtype)
    (save_file if name.endswith("safetensors") else torch.save)({"a": numbers, "b": torch.ones(2)}, tmp_path / name)
    tensors = read(open_weights(tmp_path / name))
    assert tensors["a"].dtype == torch.bfloat16 and tensors["a"].float().equal(numbers.float()) and tensors["b"].equal(torch.ones(2))


@pytest.mark.parametrize("scale, beside", [
    ({"x.scale_weight": torch.tensor(0.37)}, {"x.scale_input": torch.tensor(2.0), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}),
    ({"x.weight_scale": torch.tensor([0.37])}, {"x.input_scale": torch.tensor(2.0), "x.comfy_quant": torch.zeros(3, dtype=torch.uint8)}),
    ({"x.scale_weight": torch.tensor([[0.37], [-2.0], [1e-4]])}, {"net.scaled_fp8": torch.zeros(0)})])
def test_a_scale_beside_a_matrix_of_8_bits_is_multiplied_in(tmp_path, scale, beside):
    stored = torch.randn(3, 5).to(torch.float8_e4m3fn)
    save_file({"x.weight": stored, "x.bias": torch.ones(3), **scale, **beside}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path / "model.safetensors")
    assert weights.shapes == {"x.weight": (3, 5), "x.bias": (3,)}
    tensors = read(weights)
    assert tensors["x.weight"].equal(stored.float() * next(iter(scale.values()))) and tensors["x.bias"].equal(torch.ones(3))


@pytest.mark.parametrize("tensors, said", [
    ({"x.weight": torch.zeros(8, 1, dtype=torch.uint8), "x.weight.absmax": torch.ones(1), "x.weight.quant_map": torch.ones(16)}, "4 bits (NF4"),
    ({"x.weight": torch.zeros(2, 2, dtype=torch.int8), "x.SCB": torch.ones(2)}, "bitsandbytes' 8 bits"),
    ({"x.qweight": torch.zeros(2, 2, dtype=torch.int32)}, "a scale per block"),
    ({"x.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "x.weight_scale": torch.ones(4, 2)}, "one per block"),
    ({"x.weight": torch.zeros(4, 8, dtype=torch.int8), "x.scale_weight": torch.tensor(1.0)}, "not float8"),
    ({"x.scale_weight": torch.tensor(1.0)}, "no scale of a tensor x.weight")])
def test_other_quantised_forms_are_refused_by_name(tmp_path, tensors, said):
    save_file(tensors, file := tmp_path / "model.safetensors")
    text = refusal(lambda: read(open_weights(file)))
    assert said in text and "take the file in bf16, fp16 or fp8" in text


@pytest.mark.parametrize("name", ["flux1-dev-Q8_0.gguf", "renamed.safetensors"])
def test_gguf_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    assert f"{name} holds weights in GGUF" in refusal(open_weights, tmp_path / name)
