"""The job that runs before training: decode every captioned picture, encode it with the VAE, and store it in a cache.

The job works shard by shard. A shard's folder gets its final name only when all of it is encoded and flushed to the disk, and
the cache's index is written after the last shard. So a job that is killed at any moment loses only the shard in progress, and an
unfinished cache is never mistaken for a finished one. Any number of processes, on any hosts that share the disk, may run the
same command: each takes shards that no other process has taken (torchrun's ranks begin with different ones), and the last
process to finish writes the index.

A job that was killed ten times and restarted makes the same cache, byte for byte, as one that was never interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from tinyldm.config import PRESETS, Config, DataConfig, change, phases, split_weights
from tinyldm.data.cache import Cache, read_index, write_index
from tinyldm.data.encoding import CHUNK, Encoder, Item, decoded, encode_shard, fingerprint, make_recipe, read_shard, workers
from tinyldm.data.moved import by_content, content_of, reuse
from tinyldm.data.readers import CUT, DAMAGED, Damaged
from tinyldm.data.remote import SourceLost
from tinyldm.data.sources import Shard, Source, list_shards, parse_sources
from tinyldm.device import native_bf16
from tinyldm.files import Claims, replace_folder, write_file
from tinyldm.model import NETWORKS, network_config
from tinyldm.models.vae import AutoencoderKL, check_size

FORMAT = 1                      # version of the cache's files and of decoding and cropping: a cache of another version is refused
SHAPING = ("resolution", "buckets", "flip", "moments", "min_side", "max_aspect", "min_caption", "max_caption")
NARROW = 0.1                    # standard deviation of the posterior, relative to the latents', below which the mean is enough
FEW = 1000                      # samples after which a job that skips too many of them is stopped early


def find_shards(data: DataConfig, seed: int, finished: dict[str, list[Shard]] | None = None) -> list[tuple[str, list[Shard]]]:
    """Every source as (its spec without the weight, its shards).

    finished: {spec: shards} of a finished cache. A source that cannot be reached but is in it is taken to be unchanged.
    ValueError, SourceLost: with what to do.
    """
    found, owner = [], {}
    for spec, _ in parse_sources(data.sources):
        try:
            shards = list_shards(Source(spec, None), resolution=data.resolution, scenes=data.scenes, seed=seed)
        except SourceLost as error:
            if spec not in (finished or {}):
                raise
            print(f"{error}\nits finished latents are used as they are")
            shards = finished[spec]
        for shard in shards:
            if owner.setdefault(shard.name, spec) != spec:
                raise ValueError(f"--data {spec} and {owner[shard.name]} both name {shard.url}: leave it out of one")
        found.append((spec, shards))
    return found


def some_pictures(config: Config, count: int, check: Callable[[], None] = lambda: None) -> tuple[list[Item], Counter]:
    """About `count` usable pictures, cropped square, taken evenly from all shards, to train a VAE on or to look at.

    Returns them, and how many other pictures had to be left out, by reason. ValueError where none is usable.
    """
    shards = [shard for _, found in find_shards(config.data, config.run.seed) for shard in found]
    shards = [shards[i * len(shards) // count] for i in range(count)] if len(shards) > count else shards
    recipe, items, faults = make_recipe(config.data), [], Counter()
    with ThreadPoolExecutor(workers()) as pool:
        for i, shard in enumerate(shards):
            quota, usable = -(-(count - len(items)) // (len(shards) - i)), 0
            try:                                                # read a few more than the quota, as some may not be usable
                for item in decoded(islice(shard.read(), quota + quota // 4 + CHUNK), recipe, pool):
                    check()
                    if usable == quota:
                        break
                    faults[item.reason] += item.image is None
                    usable += item.image is not None
                    items += [item] if item.image is not None else []
            except (Damaged, ValueError) as error:
                faults[f"whole shard: {error}"] += 1
    if not items:
        raise ValueError(nothing_usable(config.data, +faults))
    return items, +faults                                       # +: without zero counts


def nothing_usable(data: DataConfig, faults: Counter) -> str:
    """The error message for sources without one usable picture."""
    return f"--data {' '.join(data.sources)}: not one usable picture in it ({listed(faults) or 'no picture with a caption found'})"


def listed(reasons: Counter) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())


# ---------------------------------------------------------------- the cache's folder


def picture_divisor(config: Config, vae: AutoencoderKL) -> int:
    """The sides of pictures, in pixels, are multiples of this: what the VAE and the network divide by."""
    network = network_config(config.network.name, config.network.settings)
    return vae.config.downscale * NETWORKS[config.network.name].divisor(network)


def settings_of(config: Config, vae: AutoencoderKL, device: torch.device = torch.device("cpu")) -> dict[str, Any]:
    """The settings that all shards of a cache were made with; a cache with others is never used. device: decides the precision."""
    bf16 = config.run.dtype == "bf16" or config.run.dtype == "auto" and native_bf16(device)
    unit = picture_divisor(config, vae) if config.data.buckets else 0
    return {"format": FORMAT, "vae": fingerprint(vae), "dtype": "bf16" if bf16 else "fp32", "unit": unit,
            "caption_key": list(split_weights(config.data.caption_key))} | {name: getattr(config.data, name) for name in SHAPING}


def check_folder(folder: Path) -> None:
    """ValueError for a folder that holds other files and no cache."""
    if folder.exists() and not (folder / "settings.json").exists():
        if others := {path.name.removeprefix(".writing-") for path in folder.iterdir()} - {"settings.json", "claims", "decoded.png"}:
            raise ValueError(f"{folder} holds other files ({', '.join(sorted(others)[:3])}) and no cache: name another folder")


def open_folder(folder: Path, settings: dict[str, Any], made_by: str, rebuild: bool) -> None:
    """Make the cache's folder, or check that an existing one was made with the same settings.

    ValueError that lists the differences; with `rebuild`, a cache with other settings is deleted instead.
    """
    file = folder / "settings.json"
    found = read_settings(folder) if file.exists() else {}
    if found and (not rebuild or {name: found.get(name) for name in settings} == settings):
        check_settings(folder, found, settings)                # with `rebuild`: another process may have rebuilt it already
    else:
        (folder / "index.json").unlink(missing_ok=True)        # first of all, so that a half-deleted cache does not look finished
        if (folder / "shards").exists():
            shutil.rmtree(folder / "shards")
        write_file(file, json.dumps(settings | {"vae_weights": made_by}, sort_keys=True, indent=1))
    (folder / "shards").mkdir(exist_ok=True)


def read_settings(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'settings.json'} is damaged ({error}): delete {folder} and prepare it again") from error


def check_settings(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError, which lists the differences, unless all settings in `wanted` have the same values in `found`."""
    def short(value: Any) -> str:
        return value[:8] if isinstance(value, str) and len(value) == 64 else json.dumps(value)

    if differences := [f"{name} {short(found.get(name))} in the cache, {short(value)} in this run" for name, value in wanted.items()
                       if found.get(name) != value]:
        raise ValueError(f"the latents in {folder} were made with other settings ({'; '.join(differences)}): "
                         "use the same, name another folder, or make them anew with prepare.py --rebuild")


def adopt(config: Config, cache: Cache, vae: AutoencoderKL) -> Config:
    """The config of a run on a finished cache: settings that the cache determines are taken from it, others must match it.

    --data and --caption-key may give other weights to the cache's sources and keys. ValueError where something does not match.
    """
    settings, wanted = cache.settings, settings_of(config, vae)
    check_settings(cache.folder, settings, {name: wanted[name] for name in ("format", "vae", "resolution")})
    if settings["buckets"] and settings["unit"] % (unit := picture_divisor(config, vae)):
        raise ValueError(f"the pictures in {cache.folder} have sides in multiples of {settings['unit']} pixels, this network takes "
                         f"multiples of {unit}: make a cache for it, or use the network it was made for")
    keys = config.data.caption_key or settings["captions"]
    if list(split_weights(keys)) != settings["caption_key"]:
        raise ValueError(f"--caption-key {' '.join(keys)}: {cache.folder} has {' '.join(settings['caption_key']) or 'the default one'}; "
                         "leave it out, or name the same with other weights")
    data, typed = settings["data"], {source.spec: word for word, source in zip(config.data.sources, parse_sources(config.data.sources))}
    if config.data.sources != PRESETS.get(config.run.preset, {}).get("data", DataConfig().sources):
        if typed.keys() != set(cache.sources):
            raise ValueError(f"--data {' '.join(config.data.sources)}: {cache.folder} was made from {' '.join(data)}; leave it out, or "
                             "name the same with other weights")
        data = [typed[spec] for spec in cache.sources]
    return change(config, data=data, caption_key=keys, **{name: settings[name] for name in SHAPING})


# ---------------------------------------------------------------- what was read, kept and left out


class Report(NamedTuple):
    """Counts and statistics of a cache, added up over its shards."""

    shards: int
    broken: int             # shards whose archive is truncated or damaged
    read: int               # samples
    kept: int               # samples
    skipped: Counter        # {reason: samples} that are broken
    filtered: Counter       # {reason: samples} outside the user's own limits
    stats: Counter          # sums over all latents

    @property
    def width(self) -> float:
        """The standard deviation of the posterior, relative to that of the latents."""
        n, total, squares = (self.stats[name] for name in ("numbers", "sum", "squares"))
        return (self.stats["variance"] / max(squares - total**2 / n, 1e-12)) ** 0.5 if n else 0.0

    def __str__(self) -> str:
        lines = [f"{self.shards:,} shard{'s' * (self.shards != 1)}: {self.read:,} samples read, {self.kept:,} kept"]
        if self.broken:
            lines.append(f"{self.broken:,} of the shards are damaged or cut short: what they should hold besides is not known")
        for title, counts in (("skipped", self.skipped), ("filtered out", self.filtered)):
            if n := sum(counts.values()):
                lines.append(f"{title}: {n:,} ({n / self.read:.2%}): {listed(counts)}; each is named in skipped.jsonl")
        advice = "the mean is enough" if self.width < NARROW else "wide enough for --moments to be worth its space"
        return "\n".join([*lines, f"standard deviation of the VAE's posterior over that of the latents: {self.width:.2%} ({advice})"])


def add_up(facts: Iterable[dict[str, Any]]) -> Report:
    """The sum of the contents of many shard.json files."""
    facts = list(facts)
    sums = {name: sum((Counter(shard[name]) for shard in facts), Counter()) for name in ("skipped", "filtered")}
    stats = Counter()
    for shard in facts:
        stats.update(shard["stats"])
    broken = sum(bool({CUT, DAMAGED}.intersection(shard["skipped"])) for shard in facts)
    return Report(len(facts), broken, sum(shard["read"] for shard in facts), sum(shard["kept"] for shard in facts), stats=stats, **sums)


def judge(data: DataConfig, report: Report, shards: int) -> None:
    """ValueError when too large a part of the samples had to be skipped, or too large a part of the shards is broken.

    shards: how many there are in all. Broken shards count by themselves, because how many samples they lost is not known.
    """
    for what, bad, of in (("samples", sum(report.skipped.values()), report.read), ("shards", report.broken, shards)):
        if bad > data.max_skip * of:
            raise ValueError(f"{bad:,} of {of:,} {what} had to be skipped or are cut short, more than --max-skip {data.max_skip:g} "
                             f"allows ({listed(report.skipped)}; named in shards/*/skipped.jsonl): repair the data, or raise "
                             "--max-skip: encoded shards are kept")


# ---------------------------------------------------------------- the job


def phase_folders(config: Config, base: Path) -> list[tuple[Config, Path]]:
    """The config of every phase and the folder of its latents: --cache, else `base`, or `base`-SIZE where there are several."""
    several = bool(config.data.phases)
    own = lambda phase: base.with_name(f"{base.name}-{phase.data.resolution}") if several else base
    return [(phase, Path(phase.data.cache[0]) if phase.data.cache else own(phase)) for phase in phases(config)]


def prepare(config: Config, folder: Path, vae: AutoencoderKL, device: torch.device, rebuild: bool = False,
            check: Callable[[], None] = lambda: None) -> Report | None:
    """Make the cache of all sources in `folder`, or the missing part of an unfinished one.

    check: called after every picture; an exception from it stops the job. Returns None while other processes are still
    encoding the last shards. ValueError, OSError: with what to do. Encoded shards are kept, and the same call continues there.
    """
    check_size(torch.empty(1, 3, config.data.resolution, config.data.resolution, device="meta"), vae.config.downscale)
    settings = settings_of(config, vae, device)
    sources = find_shards(config.data, config.run.seed, finished(folder))
    check_folder(folder)
    claims = Claims(folder / "claims", int(os.environ.get("WORLD_SIZE", 1)))
    with claims.held("settings"):
        open_folder(folder, settings, config.autoencoder.weights, rebuild)
    shards, mark = [shard for _, found in sources for shard in found], digest(settings)
    if missing := [shard for shard in shards if not read_shard(folder, shard, mark)]:
        encode_missing(config, folder, vae, device, claims, missing, mark, check)
    facts = [read_shard(folder, shard, mark) for shard in shards]
    if not all(facts):
        return None
    report = add_up(facts)
    if not report.kept:
        raise ValueError(nothing_usable(config.data, report.skipped + report.filtered))
    judge(config.data, report, len(shards))
    with claims.held("index"):
        finish(config, folder, [{"spec": spec, "shards": [shard.name for shard in found]} for spec, found in sources])
    claims.close()
    return report


def finish(config: Config, folder: Path, sources: list[dict[str, Any]]) -> None:
    """Write the files that finish a cache, unless they are up to date."""
    settings = read_settings(folder) | {"data": config.data.sources, "captions": config.data.caption_key}    # for runs on the cache alone
    indexed = [{"spec": it["spec"], "shards": [shard["name"] for shard in it["shards"]]} for it in read_sources(folder)]
    names = [name for source in sources for name in source["shards"]]
    if indexed != sources or Cache(folder).settings != settings:
        rows = [(folder / "shards" / name / "skipped.jsonl").read_text(encoding="utf-8") for name in names]
        write_file(folder / "skipped.jsonl", "".join(rows))
        write_index(folder, settings, sources)
    if others := {path.name for path in (folder / "shards").iterdir()} - set(names):
        print(f"{folder / 'shards'} also holds {len(others)} that --data does not name (any more), such as {min(others)}: "
              "they are not used and may be deleted")


def read_sources(folder: Path) -> list[dict[str, Any]]:
    """The sources of a finished cache: [{"spec", "shards": [contents of each shard.json]}]; [] where it is not finished."""
    return read_index(folder, missing={"sources": []})["sources"]


def finished(folder: Path) -> dict[str, list[Shard]]:
    """{spec: shards} of a finished cache. These shards have a name and a stamp, but cannot be read."""
    return {source["spec"]: [Shard(shard["name"], "", shard["stamp"], True, None) for shard in source["shards"]]
            for source in read_sources(folder)}


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def encode_missing(config: Config, folder: Path, vae: AutoencoderKL, device: torch.device, claims: Claims, missing: list[Shard],
                   mark: str, check: Callable[[], None]) -> None:
    """Encode the missing shards that no other process has taken. ValueError, at the end, that names those that cannot be read."""
    encoder = lambda path: Encoder(config.data, config.run.dtype, vae, device, path)
    recipe, facts, lost, done = make_recipe(config.data, picture_divisor(config, vae)), [], [], by_content(folder, mark)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with claims.held("index"):
        (folder / "index.json").unlink(missing_ok=True)
    with ThreadPoolExecutor(workers()) as pool, tqdm(unit=" pictures", dynamic_ncols=True, mininterval=1, disable=None) as bar:
        def tick() -> None:
            bar.update()
            check()

        def fill(new_folder: Path) -> None:
            if not ((content := content_of(shard)) in done and reuse(done[content], shard, new_folder)):
                encode_shard(shard, lambda samples: decoded(samples, recipe, pool), encoder, mark, new_folder, tick, content)

        for i in sorted(range(len(missing)), key=lambda i: (i - rank) % world):        # this rank's own shards first
            shard = missing[i]
            if not claims.take(shard.name) or read_shard(folder, shard, mark):
                continue
            bar.set_description(f"shard {i + 1} of {len(missing)}")
            try:
                replace_folder(folder / "shards" / shard.name, fill)
            except SourceLost as error:
                lost.append(str(error))
                continue
            except OSError as error:
                raise explain_full_disk(error, folder) from error
            facts += filter(None, [read_shard(folder, shard, mark)])       # nothing where another process is just replacing it
            if (report := add_up(facts)).read >= FEW:
                judge(config.data, report, len(missing))
    if lost:
        raise ValueError(f"{len(lost)} of {len(missing)} shards could not be read, the others are encoded: {'; '.join(lost[:3])}")


def explain_full_disk(error: OSError, folder: Path) -> OSError:
    """An error with what to do where the disk is full; other errors unchanged."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(f"no room left for {folder} ({error.strerror}): finished shards are kept; make room and run the same command again")
