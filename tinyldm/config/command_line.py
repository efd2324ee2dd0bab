"""The command line, made from the fields: flags, presets and the settings of a run to resume -> a Config."""

from __future__ import annotations

import argparse
import ast
import json
import os
from pathlib import Path
from typing import Any, get_type_hints

from tinyldm.cli import Parser
from tinyldm.config.check import check, flag
from tinyldm.config.fields import SETTINGS, Config, current, flatten, make_config
from tinyldm.config.finetune import FINETUNES, finetune_kind, finetune_row
from tinyldm.config.help import epilog, with_default
from tinyldm.config.levels import with_levels
from tinyldm.config.presets import VAE_PRESETS, preset_row
from tinyldm.lookup import lookup

# Settings that may hold paths; a resumed run keeps them all.
# Settings that have no effect with --only vae -> the end of the flag (--vae-...) that sets the same of the autoencoder; "": none does.
OF_THE_NETWORK = {"max_steps": "steps", "batch_size": "batch-size", "lr": "lr", "muon_lr": "muon-lr", "decay": "decay", "ema_decay": "ema",
                  "ema_widths": "ema", "text_lr": "", "weight_decay": "", "stages": "", "rollback": "", "eval_every": ""}
PATHS = ("data", "cache", "vae_weights", "vae_init", "vae_lpips", "text_weights", "model", "parts", "tokenizer")
RESUME = {word: word for word in ("no", "auto", "yes")}
ABOUT_RUN = ("directory", "version", "resume", "out")       # in config.json, and not settings of another run
# What can be changed instead of a setting that a run keeps.
INSTEAD = {"batch_size": " (--grad-accum makes micro-batches, and so the memory, smaller)"}


def parse(argv: list[str] | None, description: str, own: dict[str, dict] | None = None,
          names: tuple[str, ...] = ()) -> tuple[Config, argparse.Namespace]:
    """A script's command line -> (the preset's configuration with what was typed in its place; the script's own flags).

    own: those flags, as argparse takes them. names: the settings that the script knows; none: all of them.
    """
    parser, plain = Parser(description=description, usage="%(prog)s [--FLAG VALUE ...]", epilog=epilog(not names)), flatten(Config())
    groups = {group: parser.add_argument_group(kind.__doc__.split(". ")[0].rstrip(".")) for group, kind in get_type_hints(Config).items()
              if any(SETTINGS[name].group == group for name in names or SETTINGS)}
    for name in (name for name in SETTINGS if not names or name in names):
        add_flag(groups[SETTINGS[name].group], name, plain[name])
    parser.add_argument("--config", default=argparse.SUPPRESS, metavar="FILE", help="take settings from a run's config.json, or from a "
                        "JSON object with some of its names; what is typed wins")
    for word, options in (own or {}).items():
        parser.add_argument(word, **options)
    typed = vars(parser.parse_args(argv))
    rest = argparse.Namespace(**{name: typed.pop(name) for word in own or {} if (name := word[2:].replace("-", "_")) in typed})
    try:
        name_run(typed)
        row = starting_point(typed)
        if row["resume"] != "no":                               # what a resumed run keeps has been compared
            typed = {name: value for name, value in typed.items() if not SETTINGS[name].kept}
        for name in typed:
            row |= SETTINGS[name].clears
        typed["resume"] = row["resume"]
        typed = {name: merged(row, name, value) if SETTINGS[name].type is dict else value for name, value in typed.items()}
        config = make_config(**(row | typed))
        check(config)
        check_meaning(config, parser.translated)
        check_only(config, typed)
    except ValueError as error:
        parser.error(str(error))
    return config, rest


def add_flag(parser: argparse._ActionsContainer, name: str, default: Any = None) -> None:
    """One setting as a flag: its name, its type, its line of help with the default. Settings that are not typed leave no trace."""
    setting = SETTINGS[name]
    words = list(dict.fromkeys([flag(name), *map(flag, setting.also)]))
    common = dict(dest=name, default=argparse.SUPPRESS, help=with_default(setting.help, default))
    if setting.type in (bool, bool | None):
        parser.add_argument(*words, action=argparse.BooleanOptionalAction, **common)
    elif metavar := {dict: "KEY=VALUE", list: "WORD"}.get(setting.type):
        parser.add_argument(*words, nargs="+", metavar=metavar, **common)
    else:
        kind = float if setting.type == float | None else setting.type
        parser.add_argument(*words, type=kind, metavar=kind.__name__.upper(), **common)


def name_run(typed: dict[str, Any]) -> None:
    """--resume RUN, the folder of a run, becomes --out RUN --resume yes. ValueError where that contradicts what else is typed."""
    word = typed.get("resume", "no")
    if word in RESUME or not (os.path.isdir(word) or os.sep in word or "/" in word):
        return
    run = Path(word)
    if run.parent.name == "checkpoints":
        raise ValueError(f"--resume {word}: a run continues from its newest checkpoint: name the run, --resume {run.parent.parent}")
    if "out" in typed and os.path.abspath(typed["out"]) != os.path.abspath(word):
        raise ValueError(f"--resume {word} and --out {typed['out']} are two runs: leave one out")
    typed |= {"out": str(run), "resume": "yes"}


def check_meaning(config: Config, translated: dict[str, str]) -> None:
    """ValueError where another program's name of a setting would mean something else than ours."""
    word, processes = translated.get("--batch-size"), int(os.environ.get("WORLD_SIZE", 1))
    if word and (config.optimisation.grad_accum > 1 or processes > 1):
        raise ValueError(f"{word} counts the pictures of one micro-batch of one process: --batch-size are those of a whole step, over "
                         f"{config.optimisation.grad_accum} micro-batches and {processes} processes; type --batch-size")


def check_only(config: Config, typed: dict[str, Any]) -> None:
    """ValueError for settings of the network's training where the autoencoder alone is trained. (--only does not go with another
    --objective, which says so.)"""
    alone = config.run.only and "objective" not in typed
    for name in (name for name in OF_THE_NETWORK if name in typed and alone):
        advice = f"use --vae-{OF_THE_NETWORK[name]}" if OF_THE_NETWORK[name] else "leave it out"
        raise ValueError(f"{flag(name)} is a setting of the network, which --only {config.run.only} does not train: {advice}")


def starting_point(typed: dict[str, Any]) -> dict[str, Any]:
    """The values under what was typed: a preset's row, or those of the run to resume. "resume" among them says which: no or auto."""
    values = read_config(typed.pop("config", ""))
    if kind := finetune_kind(values | typed):
        lookup(FINETUNES, kind, "--finetune")
        if "preset" in typed:
            raise ValueError(f"--preset {typed['preset']} describes a new network, and --finetune trains one that exists: leave one out")
    preset = kind or typed.get("preset", values.get("preset", "tiny"))
    others = [typed.get(name, values.get(name)) for name in ("network", "autoencoder")]
    row = finetune_row(values | typed) if kind else preset_row(preset, *others)
    for name in values:
        row = row | SETTINGS[name].clears
    row = row | {"resume": "no"} | {name: merged(row, name, value) if isinstance(value, dict) else value
                                    for name, value in values.items()}
    run = Path(typed.get("out") or f"runs/{preset}")
    wanted, saved = lookup(RESUME, typed.get("resume", "no"), "--resume"), run / "config.json"
    if wanted != "no" and not saved.exists() and ((run / "checkpoints").exists() or (run / "vae").exists()):
        raise ValueError(f"{saved} is missing: write the run's settings into it again, or start another run with --out")
    if wanted == "yes" and not saved.exists():
        raise ValueError(f"nothing to resume: {saved} is not there; name the run's folder with --out, or let --resume auto start it")
    if wanted == "no" or not saved.exists():
        return laid_over(row, typed.get("vae_preset"), others[1])
    try:
        content = json.loads(saved.read_text(encoding="utf-8"))
        row = {name: value for name, value in current(content).items() if name in SETTINGS} | {"resume": "auto"}
        known = flatten(make_config(**row))                    # with the defaults of settings that are newer than the run
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{saved} is damaged ({error}): write the run's settings into it again, or start another run with --out") from None
    for name in (name for name in typed if SETTINGS[name].kept):
        value = merged(known, name, typed[name]) if SETTINGS[name].type is dict else typed[name]
        if not same(name, flatten(make_config(**{name: value}))[name], known, content.get("directory") or os.getcwd()):
            raise ValueError(f"a run keeps its {flag(name)} ({known[name]}): leave it out to resume{INSTEAD.get(name, '')}, "
                             "or start another run with --out")
    return row


def read_config(file: str) -> dict[str, Any]:
    """The settings in the file of --config: a run's config.json, or a JSON object with some of its names; {} without a file. What belongs
    to the run itself (its folder, whether it is resumed) is left out. ValueError, with advice, for a file that is none."""
    if not file:
        return {}
    path = Path(file) / "config.json" if Path(file).is_dir() else Path(file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no {...}")
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {file}: {getattr(error, 'strerror', None) or error}: name a run's config.json, or a file such as "
                         '{"max_steps": 500, "lr": 0.001}') from None
    values = current({name.replace("-", "_"): value for name, value in content.items() if name not in ABOUT_RUN})
    for name in values:
        lookup(SETTINGS, name, f"setting in {file}")
    return values


def laid_over(row: dict[str, Any], vae_preset: str | None, autoencoder: str | None) -> dict[str, Any]:
    """A preset's row with the settings of --vae-preset in its place, without the autoencoder's fields where another kind is asked for."""
    own = lookup(VAE_PRESETS, vae_preset, "--vae-preset") if vae_preset else {}
    if own and autoencoder not in (None, own["autoencoder"]):
        own = own | {"vae": {}}
    for name in own:
        row = row | SETTINGS[name].clears
    return row | own


def same(name: str, asked: Any, known: dict[str, Any], directory: str) -> bool:
    """Whether a setting has the value that the run has already. Paths may be spelt otherwise, from the folder that the command is
    typed in now and from that in which the run began (directory); on a run's --cache the order of its --data has no meaning."""
    values = [json.loads(json.dumps(value)) for value in (asked, known[name])]
    if name not in PATHS or not all(values):
        return values[0] == values[1]
    words = [sorted(found) if name == "data" and known["cache"] else found if isinstance(found, list) else [found] for found in values]
    return len(words[0]) == len(words[1]) and all(same_path(*pair, directory) for pair in zip(*words))


def same_path(asked: str, known: str, directory: str) -> bool:
    """Whether two words mean the same file or folder, or are the same word where they mean none (a hub id, a pattern, a URL)."""
    one, two = (os.path.normpath(os.path.join(base, os.path.expanduser(word)))
                for base, word in ((os.getcwd(), asked), (directory, known)))
    if two.startswith(os.path.join(one, "checkpoints", "")):    # --model is stored as the model of a run's newest checkpoint
        return True
    if os.path.exists(one) and os.path.exists(two):
        return os.path.samefile(one, two)
    return asked == known or one == two


def merged(row: dict[str, Any], name: str, words: list[str] | dict[str, Any]) -> dict[str, Any]:
    """A preset's key=value pairs with those typed (or read from a file) in their place; picture sizes are replaced as a whole."""
    typed, before = words if isinstance(words, dict) else pairs(name, words), row.get(name, {})
    if name == "unet" or name == "net" and row.get("network", "unet") == "unet":
        typed = with_levels(typed, before if name == "unet" else row.get("unet", {}) | before)
    return typed if name == "stages" else {**before, **typed}


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
