"""What `python -m tinyldm.adapters` does: one function for each command, which takes the parsed arguments and prints."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tinyldm.adapters.files import HEADER, STATED, newest, read_adapter, read_layers, save_adapter
from tinyldm.adapters.formats import family, prefixes
from tinyldm.adapters.kinds import DoRA, kind_of
from tinyldm.adapters.low_rank import Kept, LowRank, approximated, truncated
from tinyldm.adapters.merge import apply_adapters
from tinyldm.device import pick_dtype
from tinyldm.files import replace_folder, write_file
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_loaded
from tinyldm.model import Model
from tinyldm.unicode import shown


def load(source: str, device: str = "cpu") -> Model:
    """The model that is named; of a run that of its newest checkpoint."""
    found = newest(Path(source), "model/model_index.json")
    return load_model(found.parent if found else source, device)


def show(args: argparse.Namespace) -> None:
    """Print what an adapter changes, how strongly, and what its header says."""
    file = read_layers(args.adapter)
    print(f"{file.path}: for {family(file.layers) or 'a model that its names do not tell'}")
    kinds, ranks, scales, dtypes = Counter(), Counter(), Counter(), Counter()
    for name, fields in file.layers.items():
        change = file.change(name)
        inner = change.inner if isinstance(change, DoRA) else change
        kinds[kind_of(fields) + (" as DoRA" if inner is not change else "")] += 1
        scales[f"{inner.scale:g}"] += 1
        dtypes[str(max(fields.values(), key=torch.numel).dtype).removeprefix("torch.")] += 1
        if isinstance(inner, LowRank):
            ranks[str(inner.rank)] += 1
    for title, counter in (("layers", kinds), ("ranks", ranks), ("scales (alpha / rank)", scales), ("precision", dtypes)):
        if counter:
            print(f"  {title}: " + ", ".join(f"{value} ({count})" if len(counter) > 1 or title == "layers" else value
                                             for value, count in counter.most_common(8)))
    print("  first and last layer: " + ", ".join(dict.fromkeys([min(file.layers), max(file.layers)])))
    for name, text in sorted(file.metadata.items()):           # safetensors gives them in any order
        if name != "format":
            print(f"  {name}: {shown(text)[:200]}")


def convert(args: argparse.Namespace) -> None:
    """Write an adapter under other names. The model is only asked for its shapes."""
    model = load(args.model, "meta")
    adapter = read_adapter(args.adapter, model)
    known = json.loads(adapter.metadata.get(HEADER, "{}"))
    save_adapter(args.out, adapter.changes(), model, known, args.layout, args.dtype and pick_dtype(args.dtype, torch.device("cpu")))
    print(f"{args.out}: {len(adapter.entries)} layers in {args.layout}'s layout")


def resize(args: argparse.Namespace) -> None:
    """Write an adapter of lower rank under the same names. The scale is multiplied into B, so that alpha is the rank."""
    file = read_layers(args.adapter)
    tensors: dict[str, Tensor] = {}
    kept: dict[str, Kept] = {}
    for name, fields in file.layers.items():
        change, keys = file.change(name), file.keys[name]
        if not isinstance(change, LowRank):
            raise ValueError(f"{file.path}: {name} is not plain LoRA, which alone can be resized")
        kept[name], dtype = truncated(change, args.rank, args.keep), fields["up"].dtype
        small = kept[name].change
        tensors |= {keys["down"]: small.down.to(dtype), keys["up"]: small.up.to(dtype)}
        if "alpha" in keys:
            tensors[keys["alpha"]] = torch.tensor(float(small.rank))
    ranks = {each.change.rank for each in kept.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    header = {key: text for key, text in file.metadata.items() if key != STATED}
    header |= {"format": "pt"} | {key: rank for key in ("ss_network_dim", "ss_network_alpha") if key in header}
    if HEADER in header:
        header[HEADER] = json.dumps(json.loads(header[HEADER]) | {"rank": rank, "alpha": rank})
    write_file(Path(args.out), save({key: tensor.contiguous() for key, tensor in tensors.items()}, header))
    print_kept(args.out, kept)


def print_kept(out: str, kept: Mapping[str, Kept]) -> None:
    """How much of the changes a new adapter keeps."""
    least = min(kept, key=lambda name: kept[name].energy)
    whole = sum(each.total for each in kept.values())
    share = sum(each.energy * each.total for each in kept.values()) / whole if whole else 1.0
    ranks = sorted({each.change.rank for each in kept.values()})
    print(f"{out}: {len(kept)} layers of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") +
          f"; kept energy {share:.2%} of all changes, least in {least}, {kept[least].energy:.2%}")


def extract(args: argparse.Namespace) -> None:
    """Write the difference of two models, weight by weight, as a LoRA."""
    base, tuned = load(args.model), load(args.tuned)
    kept: dict[str, Kept] = {}
    changes: dict[str, dict[str, LowRank]] = {}
    others: list[str] = []
    for part in prefixes(base):
        one, two = base.modules[part], tuned.modules.get(part)
        if two is None or {name: p.shape for name, p in one.named_parameters()} != {name: p.shape for name, p in two.named_parameters()}:
            raise ValueError(f"{args.tuned} has another {part} than {args.model}: both must have the same networks")
        for name, delta in differences(one, two):
            layer = one.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.endswith(".weight"):
                width = min(delta.shape[0], delta[0].numel())
                kept[f"{part}.{name}"] = found = approximated(delta, min(args.rank, width))
                changes.setdefault(part, {})[name] = found.change
            else:
                others.append(f"{part}.{name}")
    if not kept:
        raise ValueError(f"{args.model} and {args.tuned} have the same weights in all layers that an adapter changes")
    save_adapter(args.out, changes, base, {"extracted_from": Path(args.tuned).name, "base_model": Path(args.model).name}, args.layout,
                 pick_dtype(args.dtype, torch.device("cpu")))
    print_kept(args.out, kept)
    if others:
        first = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        print(f"left out: {len(others)} biases, norms and embeddings that differ, too ({first})")


def differences(one: nn.Module, two: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Name and change of each parameter that differs."""
    theirs = dict(two.named_parameters())
    return ((name, theirs[name] - p) for name, p in one.named_parameters() if not torch.equal(theirs[name], p))


def merge(args: argparse.Namespace) -> None:
    """Write a model with adapters in its weights. They are added in float32 and rounded once."""
    model = load(args.model)
    apply_adapters(model, args.lora)
    for part in model.modules.values():
        part.to(pick_dtype(args.dtype, torch.device("cpu")))
    named = [str(each._replace(path=Path(each.path).name)) for each in args.lora]
    model.defaults = model.defaults | {"adapters": [*model.defaults.get("adapters", []), *named]}
    replace_folder(Path(args.out).resolve(), lambda partial: save_loaded(partial, model))
    print(f'{args.out}: python sample.py "a red fox" --model {args.out}')


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "show": show, "convert": convert, "resize": resize, "extract": extract, "merge": merge}
