"""Layouts: under which names, and in which form, a network's tensors and its config are published.

Published files hold the same networks as ours under other tensor names. A table of rename rules, `list[(regex,
replacement)]`, turns our names into published ones; tinyldm/folders/rename.py applies it in both directions, to load and to
export. A replacement may end in the form in which the tensor is stored: `name@1/3` for one of three parts of a fused
tensor, `name@3-6/7` for four of seven, `name@swap` for one with its halves swapped, `name@T` for a transposed one, `name@1x1`
for a matrix stored as a 1x1 convolution, `name@1,` with one more axis in front. That file explains them.

A `Layout` is such a table and what it takes to recognise a file that needs it. Each module beside this one has LAYOUTS, the
layouts of one kind of network by name; the first of them is the one that is written. It also has `to_config` and
`from_config`, which translate between our config dataclass and the published config.json. A network that has been published
nowhere keeps our names and fields: `own_config` makes its two functions, and `lambda config: []` is its table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinyldm.files import INCOMPLETE
from tinyldm.lookup import needs_value

Shape = tuple[int, ...]

Rules = list[tuple[str, str | Callable[[re.Match], str]]]   # (regex, replacement), as re.sub takes them


@dataclass(frozen=True)
class Layout:
    """One form in which a kind of network is published.

    mark     regex of one tensor name that every such file holds; its group 1 is the prefix of all the network's names
    rules    config -> rules from our names to the published ones without the prefix
    tidy     config -> rules from the names in a file, old spellings among them, to the names that `rules` gives; a tensor
             whose name becomes '' is left out
    infer    shapes of the tensors by name -> config, for layouts that are published without a config.json
    """

    mark: str
    rules: Callable[[Any], Rules]
    tidy: Callable[[Any], Rules] = lambda config: []
    infer: Callable[[Mapping[str, Shape]], Any] | None = None

    def config_of(self, shapes: Mapping[str, Shape]) -> Any:
        """`infer`, with a ValueError where a tensor is missing whose shape is needed for the config."""
        try:
            return self.infer(shapes)
        except (LookupError, StopIteration) as error:
            lost = error.args[0] if isinstance(error, KeyError) else "a tensor of its outermost layers"
            raise ValueError(f"the network's size cannot be told from its tensors, {lost} is missing: {INCOMPLETE}") from error


def apply(rules: Rules, name: str) -> str:
    """The name after every rule, in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """The number of blocks in names of tensors; group 1 of the pattern is a block's number, from 0 on."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


class ConfigFunctions(NamedTuple):
    to_config: Callable[[Any], dict]
    from_config: Callable[[dict], Any]


def own_config(class_name: str, config_class: type) -> ConfigFunctions:
    """to_config and from_config of a network without a published layout: config.json holds the fields of its dataclass, and
    as `_class_name` a name that no other library has. JSON has no tuples: a field whose default is one is read as a tuple."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}

    def to_config(config: Any) -> dict:
        return {"_class_name": class_name} | dataclasses.asdict(config)

    def from_config(config: dict) -> Any:
        if (found := config.get("_class_name")) != class_name:
            raise ValueError(f"config.json describes a {found}, not a {class_name}: is it the folder of another model?")
        values = {name: tuple(value) if isinstance(value, list) and isinstance(fields[name].default, tuple) else value
                  for name, value in config.items() if name in fields}
        if unknown := sorted(name for name in config if not name.startswith("_") and name not in fields):
            raise ValueError(f"{class_name} config has unknown fields ({', '.join(unknown)}): is it of a newer version?")
        if missing := [name for name, field in fields.items() if name not in values and needs_value(field)]:
            raise ValueError(f"{class_name} config lacks {', '.join(missing)}: {INCOMPLETE}")
        return config_class(**values)

    return ConfigFunctions(to_config, from_config)
