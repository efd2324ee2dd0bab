"""The command line, made from the fields: flags, presets and the settings of a run to resume -> a Config."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from tinyldm.cli import Parser
from tinyldm.config.check import check, flag
from tinyldm.config.fields import OTHER_NAMES, SETTINGS, Config, flatten, make_config
from tinyldm.config.presets import PRESETS
from tinyldm.lookup import lookup


def parse(argv: list[str] | None, description: str, own: dict[str, dict] | None = None,
          names: tuple[str, ...] = ()) -> tuple[Config, argparse.Namespace]:
    """A script's command line -> (the preset's configuration with what was typed in its place; the script's own flags).

    own: those flags, as argparse takes them. names: the settings that the script knows; none: all of them.
    """
    parser = Parser(description=description)
    for name in (name for name in SETTINGS if not names or name in names):
        add_flag(parser, name)
    for word, options in (own or {}).items():
        parser.add_argument(word, **options)
    typed = vars(parser.parse_args(argv))
    rest = argparse.Namespace(**{name: typed.pop(name) for word in own or {} if (name := word[2:].replace("-", "_")) in typed})
    try:
        row = starting_point(typed)
        for name in typed:
            if name != "resolution" or typed.get("resume") != "auto":             # a resumed run keeps its resolution
                row |= SETTINGS[name].clears
        typed = {name: merged(row, name, value) if SETTINGS[name].type is dict else value for name, value in typed.items()}
        config = make_config(**(row | typed))
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, rest


def add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    """One setting as a flag: its name, its type, its line of help. Settings that are not typed leave no trace."""
    setting = SETTINGS[name]
    words = list(dict.fromkeys([flag(name), *map(flag, setting.also)]))
    common = dict(dest=name, default=argparse.SUPPRESS, help=setting.help)
    if setting.type in (bool, bool | None):
        parser.add_argument(*words, action=argparse.BooleanOptionalAction, **common)
    elif metavar := {dict: "KEY=VALUE", list: "WORD"}.get(setting.type):
        parser.add_argument(*words, nargs="+", metavar=metavar, **common)
    else:
        kind = float if setting.type == float | None else setting.type
        parser.add_argument(*words, type=kind, metavar=kind.__name__.upper(), **common)


def starting_point(typed: dict[str, Any]) -> dict[str, Any]:
    """The values under what was typed: a preset's row, or those of the run to resume."""
    preset = typed.get("preset", "tiny")
    row = lookup(PRESETS, preset, "preset") | {"preset": preset}
    saved = Path(typed.get("out", f"runs/{preset}")) / "config.json"
    if lookup({"no": False, "auto": True}, typed.get("resume", "no"), "--resume") is False:
        return row
    if not saved.exists():
        raise ValueError(f"nothing to resume: {saved} is not there; start the run without --resume, or name its folder with --out")
    try:
        row = {OTHER_NAMES.get(name, name): value for name, value in json.loads(saved.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{saved} is damaged ({error}): write the run's settings into it again, or start another run with --out") from None
    row = {name: value for name, value in row.items() if name in SETTINGS}
    known = flatten(make_config(**row))                        # with the defaults of settings that are newer than the run
    for name in (name for name in typed if SETTINGS[name].kept):
        asked = merged(known, name, typed[name]) if SETTINGS[name].type is dict else typed[name]
        if json.loads(json.dumps(asked)) != json.loads(json.dumps(known[name])):
            raise ValueError(f"a run keeps its {flag(name)} ({known[name]}): leave it out to resume, "
                             "or start another run with --out")
    return row


def merged(row: dict[str, Any], name: str, words: list[str]) -> dict[str, Any]:
    """A preset's key=value pairs with those typed in their place; picture sizes are replaced as a whole."""
    return pairs(name, words) if name == "stages" else {**row.get(name, {}), **pairs(name, words)}


def pairs(name: str, words: list[str]) -> dict[str, Any]:
    """["widths=64,128", "groups=8"] -> {"widths": (64, 128), "groups": 8}."""
    result = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            example = "256=0.8 512=0.2" if name == "stages" else "widths=32,64,128"
            raise ValueError(f"{flag(name)} takes KEY=VALUE, got '{word}': for example {flag(name)} {example}")
        try:
            result[key] = ast.literal_eval(value.replace("true", "True").replace("false", "False"))
        except (ValueError, SyntaxError):
            result[key] = value
    return result
