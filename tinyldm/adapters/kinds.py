"""What the tensors of an adapter's file do to a weight: LoRA, LoHa and LoKr, each of them also as DoRA.

All kinds become dense changes of weights. Only LoRA is trained here; the others are read and merged. Formulas and names of tensors:
LyCORIS (arXiv:2309.14859; KohakuBlueleaf/LyCORIS, modules/), DoRA (arXiv:2402.09353, Eq. 5). A strength other than 1 multiplies the
whole change, also of DoRA, so that 0 is the base model (as in ComfyUI and AUTOMATIC1111; peft scales B A inside the norm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tinyldm.adapters.low_rank import LowRank

Fields = Mapping[str, Tensor]               # the tensors of one layer: name of a field (formats.FIELDS) -> tensor


class Change(Protocol):
    """A change of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change: that of the weight, or one with as many rows and as many numbers in a row."""

    def delta(self, weight: Tensor) -> Tensor:
        """The change of this weight, float32 on its device, at strength 1."""


@dataclass(frozen=True)
class Product:
    """scale times a dense product of small tensors, which is computed when it is needed."""

    fields: Fields
    formula: Callable[[Fields], Tensor]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.formula({name: field.to("meta") for name, field in self.fields.items()}).shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * self.formula({name: field.to(weight.device, torch.float32) for name, field in self.fields.items()})


@dataclass(frozen=True)
class DoRA:
    """The weight plus a change, scaled so that each row has the norm that `magnitude` says; or each column, the input channels of a
    convolution being columns."""

    inner: Change
    magnitude: Tensor
    rows: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def delta(self, weight: Tensor) -> Tensor:
        base = weight.float()
        changed = base + self.inner.delta(weight).reshape(base.shape)
        along = [axis for axis in range(base.dim()) if axis != (0 if self.rows else 1)]
        norm = torch.linalg.vector_norm(changed, dim=along, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return changed * (self.magnitude.to(norm).view_as(norm) / norm) - base


# ---- the kinds


class Kind(NamedTuple):
    """A kind of adapter. Each function takes the fields of a layer."""

    mark: tuple[str, ...]                           # how names of its fields begin
    lacking: Callable[[Fields], list[str]]          # which fields are missing
    rank: Callable[[Fields], int | None]            # what alpha is divided by; None: alpha has no meaning
    build: Callable[[Fields, float], Change]        # from the scale alpha / rank


def _of(*names: str) -> Callable[[Fields], list[str]]:
    return lambda fields: [name for name in names if name not in fields]


def _lora(fields: Fields, scale: float) -> LowRank:
    down, up = fields["down"], fields["up"]
    if "mid" in fields:                             # Tucker's form of a convolution: 1x1, k x k, 1x1
        down = torch.einsum("i j k l, j r -> i r k l", fields["mid"].float(), down.float().flatten(1))
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"its rank is {down.shape[0]} in one of its two matrices, {list(down.shape)}, and {up.shape[1]} in the other, "
                         f"{list(up.shape)}")
    return LowRank(down, up, scale)


def _tucker(core: Tensor, out: Tensor, ins: Tensor) -> Tensor:
    """core [r, s, k, k], out [r, o], ins [s, i] -> [o, i, k, k]."""
    return torch.einsum("r s ..., r o, s i -> o i ...", core, out, ins)


def _loha(fields: Fields) -> Tensor:
    halves = [(fields[f"hada_w{i}_a"], fields[f"hada_w{i}_b"], fields.get(f"hada_t{i}")) for i in (1, 2)]
    first, second = (a @ b.flatten(1) if core is None else _tucker(core, a, b) for a, b, core in halves)
    return first * second


def _lokr(fields: Fields) -> Tensor:
    whole = lambda i: fields[f"lokr_w{i}"] if f"lokr_w{i}" in fields else fields[f"lokr_w{i}_a"] @ fields[f"lokr_w{i}_b"].flatten(1)
    if "lokr_t2" in fields:
        second = _tucker(fields["lokr_t2"], fields["lokr_w2_a"], fields["lokr_w2_b"])
    else:
        second = whole(2)
        if (b := fields.get("lokr_w2_b")) is not None and b.dim() == 4:
            second = second.view(len(second), *b.shape[1:])
    first = whole(1)
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - first.dim())), second.contiguous())


def _lokr_lacking(fields: Fields) -> list[str]:
    pairs = [(f"lokr_w{i}", (f"lokr_w{i}_a", f"lokr_w{i}_b")) for i in (1, 2)]
    return [name for whole, parts in pairs if whole not in fields for name in parts if name not in fields]


def _lokr_rank(fields: Fields) -> int | None:
    """None where both factors are stored whole: LyCORIS then ignores its alpha."""
    return next((fields[name].shape[0] for name in ("lokr_t2", "lokr_w2_b", "lokr_w1_b") if name in fields), None)


KINDS: dict[str, Kind] = {
    "LoRA": Kind(("down", "up", "mid"), _of("down", "up"), lambda fields: fields["down"].shape[0], _lora),
    "LoHa": Kind(("hada_",), _of("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), lambda fields: fields["hada_w1_b"].shape[0],
                 lambda fields, scale: Product(fields, _loha, scale)),
    "LoKr": Kind(("lokr_",), _lokr_lacking, _lokr_rank, lambda fields, scale: Product(fields, _lokr, scale)),
}


def kind_of(fields: Fields) -> str:
    """The key of KINDS for the fields of a layer. ValueError for none and for several."""
    found = [name for name, kind in KINDS.items() if any(field.startswith(kind.mark) for field in fields)]
    if len(found) != 1:
        raise ValueError(f"it has {', '.join(sorted(fields))} and is {' and '.join(found) or 'none of ' + ', '.join(KINDS)}")
    return found[0]


def build(fields: Fields, scale: Callable[[int | None], float | None]) -> Change:
    """The change that the fields of one layer describe. scale: rank, None where the fields do not tell it -> the scale that the file
    states besides, None where it states none; the field alpha of a layer comes first, and without either the scale is 1. ValueError for
    fields that do not fit together."""
    name = kind_of(fields)
    kind = KINDS[name]
    if lacking := kind.lacking(fields):
        raise ValueError(f"it is {name} without {' and '.join(lacking)}")
    rank, alpha = kind.rank(fields), float(fields["alpha"].sum()) if "alpha" in fields else 0.0
    factor = alpha / rank if alpha and rank else scale(rank)
    own = {field: tensor for field, tensor in fields.items() if field.startswith(kind.mark)}
    try:
        change = kind.build(own, 1.0 if factor is None else factor)
        rows, *rest = change.shape
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{field} {list(tensor.shape)}" for field, tensor in fields.items())
        raise ValueError(f"the shapes of its tensors do not fit together: {shapes}") from error
    for field in ("magnitude", "dora_scale"):
        if (magnitude := fields.get(field)) is not None:
            # peft's is of rows; LyCORIS' is [rows, 1, ...] or [1, columns, ...].
            by_rows = field == "magnitude" or magnitude.dim() < 2 or magnitude.shape[0] == magnitude.numel() == rows
            if magnitude.numel() != (rows if by_rows else rest[0]):
                raise ValueError(f"its {field} has {magnitude.numel()} numbers, for {rows} rows and {rest[0]} columns")
            change = DoRA(change, magnitude, by_rows)
    return change
