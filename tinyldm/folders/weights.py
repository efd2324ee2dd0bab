"""Opens weight files: names and shapes first, without reading the data, and then one tensor after the other.

A `Weights` holds names and shapes, and a way to stream the tensors. Files are memory-mapped, and a tensor is read only when it is
copied to its destination, so loading a model takes hardly more memory than the model itself. Safetensors is preferred to pickle;
pickles (.ckpt, .bin, .pt, .pth) are opened with weights_only=True, which runs no code from the file.

Weights that are stored in 8 bits (float8) come out in bfloat16, which holds the same numbers, or, where a scale is stored beside each of
them, in float32 and multiplied. Other quantised forms are refused by name: QUANTISED.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinyldm.device import out_of_memory
from tinyldm.files import INCOMPLETE
from tinyldm.unicode import check_unicode
from tinyldm.vendor_loaders.layout import Shape

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
ALSO_CALLED = {"model": ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")}
MAX_RESIDENT = 16 * 2**20               # bytes of a mapped file that may stay in memory

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# ComfyUI's "scaled" files (comfy/ops.py): of each float8 matrix its scale, and what is needed only to multiply in 8 bits.
SCALE, NOT_NEEDED = r"(.*\.)?(?:scale_weight|weight_scale)", r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)"
# Names of tensors that only files in a form have that is not read here -> the form.
QUANTISED = {
    r".*\.(absmax|quant_map|quant_state\.bitsandbytes__\w+)": "bitsandbytes' 4 bits (NF4 or FP4)",
    r".*\.(SCB|weight_format)": "bitsandbytes' 8 bits",
    r".*\.(qweight|qzeros|g_idx|wscales|weight_packed|weight_scale_2|weight_scale_inv)": "4 or 8 bits with a scale per block",
}
INSTEAD = "take the file in bf16, fp16 or fp8"
MAPPED = ContextVar("MAPPED", default=False)            # see mapped_weights

Stream = Iterator[tuple[str, Tensor]]


@contextmanager
def mapped_weights(on: bool = True) -> Iterator[None]:
    """Inside, weights that a file has in the wanted dtype, for the CPU, stay in the mapped file and are read when they are used: nothing is
    copied, changes stay in memory, and a file that is overwritten meanwhile ends the process (SIGBUS)."""
    token = MAPPED.set(on)
    try:
        yield
    finally:
        MAPPED.reset(token)


@dataclass(frozen=True)
class Weights:
    """Named tensors that are not in memory yet."""

    shapes: Mapping[str, Shape]
    read: Callable[[Collection[str]], Stream]   # see `stream`; the names are some of those in `shapes`
    facts: Mapping[str, object]         # what the file says besides: numbers of a pickle (global_step), a safetensors header's texts

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """From tensors that are in memory already."""
        return cls({name: tuple(t.shape) for name, t in tensors.items()}, _among(tensors), {})

    def stream(self) -> Stream:
        """(name, tensor), each name of `shapes` once; tensors may be views of a file. What `renamed` has left out is not read."""
        return self.read(self.shapes.keys())

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """The same tensors under the names that `rename` returns; '' leaves a tensor out. ValueError where two get the same name."""
        names = {name: new for name in self.shapes if (new := rename(name))}
        if len(set(names.values())) < len(names):
            taken: dict[str, str] = {}
            for name, new in names.items():
                if taken.setdefault(new, name) != name:
                    raise ValueError(f"{taken[new]} and {name} are the same tensor {new} twice: {INCOMPLETE}")
        def read(wanted: Collection[str]) -> Stream:
            return ((names[name], tensor) for name, tensor in self.read({name for name, new in names.items() if new in wanted}))

        return Weights({new: self.shapes[name] for name, new in names.items()}, read, self.facts)

    def joined(self, other: Weights) -> Weights:
        """The tensors of both, as of two shards. They must have no name in common."""
        def read(wanted: Collection[str]) -> Stream:
            for part in (self, other):
                yield from part.read({name for name in wanted if name in part.shapes})

        return Weights({**self.shapes, **other.shapes}, read, {**self.facts, **other.facts})


def _among(tensors: Mapping[str, Tensor]) -> Callable[[Collection[str]], Stream]:
    return lambda wanted: ((name, tensor) for name, tensor in tensors.items() if name in wanted)


@contextmanager
def errors_about(path: str | Path) -> Iterator[None]:
    """Inside, errors become ValueErrors that name this file or folder, also those that a config's value of a wrong type or size
    causes."""
    try:
        yield
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{path}: its config holds a value that makes no network ({_first_line(error)}): {INCOMPLETE}") from error


def sort_metadata(file: Path) -> None:
    """Sort the entries of a header's metadata, which safetensors writes in another order every time, so that the same weights are the same
    bytes."""
    with open(file, "r+b") as handle:
        header = handle.read(int.from_bytes(handle.read(8), "little"))
        begin, found = header.find(b"{", 1), json.loads(header).get("__metadata__", {})
        text = lambda entries: json.dumps(dict(entries), ensure_ascii=False, separators=(",", ":")).encode()
        if header[:begin] == b'{"__metadata__":' and len(found) > 1:
            _, end = json.JSONDecoder().raw_decode(header[begin:].decode())
            old = header[begin:].decode()[:end].encode()
            if len(new := text(sorted(found.items()))) == len(old):
                handle.seek(8 + begin)
                handle.write(new)


def write_weights(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file with the umask's permissions; `metadata` goes into its header. OSError where that fails."""
    try:    # published files have {"format": "pt"}, and transformers 4 refuses files without it
        save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error} (is the disk full?)") from error
    sort_metadata(file)
    mask = os.umask(0)
    os.umask(mask)
    with suppress(OSError):                     # CIFS and object stores have no permissions to change
        file.chmod(0o666 & ~mask)               # safetensors makes files that only their owner may read


def open_weights(file: str | Path) -> Weights:
    """A .safetensors file, an index of shards (.safetensors.index.json, .bin.index.json) or a pickle of tensors.

    ValueError for what is missing, damaged, or not a file of tensors.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {INCOMPLETE}")
    if file.name.endswith(".json"):
        return _open_shards(file)
    with open(file, "rb") as handle:
        start = handle.read(24)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a git-lfs pointer, not the weights: run 'git lfs pull' in its folder")
    if start.startswith(b"GGUF"):
        raise ValueError(f"{file} holds weights in GGUF, llama.cpp's quantised form, which is not read here: {INSTEAD}")
    weights = _open_pickle(file) if file.suffix.lower() in PICKLES else _open_safetensors(file)
    with errors_about(file):
        return _without_float8(weights)


def _without_float8(weights: Weights) -> Weights:
    """The same weights in bfloat16 or float32 where they are stored in float8. ValueError for other quantised forms."""
    for pattern, form in QUANTISED.items():
        if found := next((name for name in weights.shapes if re.fullmatch(pattern, name)), None):
            raise ValueError(f"the weights are quantised in {form} ({found}), which is not read here: {INSTEAD}")
    scale_of = {f"{found[1] or ''}weight": name for name in weights.shapes if (found := re.fullmatch(SCALE, name))}
    for name, scale in scale_of.items():
        if weights.shapes.get(name) is None or weights.shapes[scale] not in ((), (1,), (weights.shapes[name][0], 1)):
            raise ValueError(f"{scale} {list(weights.shapes[scale])} is no scale of a tensor {name}, or one per block: {INSTEAD}")
    left_out = {*scale_of.values(), *(name for name in weights.shapes if re.fullmatch(NOT_NEEDED, name))}

    def read(wanted: Collection[str]) -> Stream:
        scales = {name: tensor.float().clone() for name, tensor in weights.read({scale_of[name] for name in wanted if name in scale_of})}
        for name, tensor in weights.read(wanted):
            if name in scale_of and tensor.dtype not in FLOAT8:
                raise ValueError(f"{name} has a scale but is {tensor.dtype}, not float8: {INSTEAD}")
            tensor = tensor.to(torch.bfloat16) if tensor.dtype in FLOAT8 else tensor
            yield name, tensor.float() * scales[scale_of[name]] if name in scale_of else tensor

    return replace(weights, shapes={name: shape for name, shape in weights.shapes.items() if name not in left_out}, read=read)


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path | None:
    """The weights file of a part folder, None where there is none."""
    found = choose({file.name for file in folder.iterdir()} if folder.is_dir() else set(), stem, variant)
    return folder / found if found else None


def choose(names: set[str], stem: str, variant: str | None = None) -> str | None:
    """The file among `names` that holds a network's weights. Preferred are safetensors over pickle, one file over shards, and
    full precision over fp16 unless a variant is asked for."""
    stems = ALSO_CALLED.get(stem, (stem,))
    variants = (variant,) if variant else (None, "fp16")
    for kind in ("safetensors", "bin"):
        for which in variants:
            for name in stems:
                dotted = f".{which}" if which else ""
                for candidate in (f"{name}{dotted}.{kind}", f"{name}.{kind}.index{dotted}.json",
                                  f"{name}{dotted}.{kind}.index.json"):
                    if candidate in names:
                        return candidate
    return None


def _open_safetensors(file: Path) -> Weights:
    check_unicode(str(file))            # safetensors opens no file of another name

    def opened():
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}): {INCOMPLETE}") from error

    with opened() as handle:
        shapes, facts = {name: tuple(handle.get_slice(name).get_shape()) for name in _in_order(handle)}, handle.metadata() or {}

    def read(wanted: Collection[str]) -> Stream:
        # Pages that were read stay in memory as long as the file is mapped: map it again after every MAX_RESIDENT bytes.
        handle, resident = None, 0
        for name in (name for name in shapes if name in wanted):
            handle = handle or opened()
            tensor = handle.get_tensor(name)
            if resident + tensor.nbytes > MAX_RESIDENT and not MAPPED.get():
                del handle, tensor
                handle, resident = opened(), 0
                tensor = handle.get_tensor(name)
            yield name, tensor
            resident += tensor.nbytes

    return Weights(shapes, read, facts)


def _in_order(handle: safe_open) -> list[str]:
    """The tensors' names in the order of their data in the file; in any order with old versions of safetensors."""
    return getattr(handle, "offset_keys", handle.keys)()


def _open_pickle(file: Path) -> Weights:
    content = unpickle(file)
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = {**{name: value for name, value in content.items() if isinstance(value, int)}, **content["state_dict"]}
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not named tensors: is it a file of weights?")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    facts = {str(name): value for name, value in content.items() if isinstance(value, (int, float))}
    return replace(Weights.of(tensors), facts=facts)


def unpickle(file: Path) -> object:
    """The content of a pickle of tensors, numbers, texts, and lists and dicts of them. ValueError for a damaged one, and for one that
    holds anything else."""
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # files of torch before 1.6 cannot be mapped
    except Exception as error:          # a damaged pickle can raise an exception of any type
        raise ValueError(_unreadable(file, error)) from error


def _unreadable(file: Path, error: Exception) -> str:
    """The reason why torch refuses a file, without its advice to open the file nevertheless."""
    instead = "Use a .safetensors file of the same weights"
    if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (f"{file} is refused: it is a pickle that holds more than tensors ({foreign[1]}), and opening it could run "
                f"code. {instead}")
    if "TorchScript" in str(error):
        return f"{file} is refused: it is a TorchScript program. {instead}"
    reason = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    return f"{file} is damaged or no file of weights ({_first_line(reason or error)}): {INCOMPLETE}"


def _open_shards(index: Path) -> Weights:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(map(str, listed.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({_first_line(error)}): {INCOMPLETE}") from error
    if odd := [name for name in names if Path(name).name != name or not name.endswith((".safetensors", *PICKLES))]:
        raise ValueError(f"{index} names {odd[0]}, which is not a weights file beside it: the folder is refused")
    joined = Weights.of({})
    for name in names:
        shard = open_weights(index.parent / name)
        if twice := joined.shapes.keys() & shard.shapes.keys():
            raise ValueError(f"{index.parent / name} holds {len(twice)} tensors of an earlier shard ({min(twice)}): {INCOMPLETE}")
        joined = joined.joined(shard)
    if lost := listed.keys() - joined.shapes.keys():
        raise ValueError(f"{index} lists {len(lost)} tensors that no shard holds ({min(lost)}): {INCOMPLETE}")
    return joined


def _first_line(error: object) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
