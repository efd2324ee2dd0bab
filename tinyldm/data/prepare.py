"""The job that runs before training: every captioned picture decoded, encoded by the VAE, and put into a cache.

Work goes shard by shard. A shard's folder takes its place whole, when all of it is encoded and flushed, and the cache's index
is written after the last one: killed at any moment, the job has lost the shard in progress, and what it leaves does not
look complete. Any number of processes, on any hosts that share the disk, may run the same command: each takes shards
that nobody else has (torchrun's ranks begin with different ones), and the last to finish writes the index.

The cache of a job that was killed ten times is, byte for byte, that of one that was not.
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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from tinyldm.config import PRESETS, Config, build, split_weights, stages
from tinyldm.data.cache import Cache, read_index, write_index
from tinyldm.data.encoding import CHUNK, Encoder, Item, decoded, encode_shard, fingerprint, make_recipe, read_shard, workers
from tinyldm.data.readers import CUT, DAMAGED, Damaged
from tinyldm.data.remote import SourceLost
from tinyldm.data.sources import Shard, Source, list_shards, parse_sources
from tinyldm.device import native_bf16
from tinyldm.files import Claims, replace_folder, write_file
from tinyldm.models.dit import DiTConfig
from tinyldm.models.unet import UNetConfig
from tinyldm.models.vae import AutoencoderKL, check_size
from tinyldm.pipeline import unit_of

FORMAT = 1                      # of the cache, and of how pictures are decoded and cropped: another number, another cache
SHAPING = ("resolution", "buckets", "flip", "moments", "min_side", "max_aspect", "min_caption", "max_caption")
NARROW = 0.1                    # a posterior this narrow, against the spread of the latents, need not be sampled
FEW = 1000                      # so many samples say enough to stop a job that skips too many of them


def find_shards(config: Config, finished: dict[str, list[Shard]] | None = None) -> list[tuple[str, list[Shard]]]:
    """Every source as (what was typed, without its weight; its shards).

    finished: of a cache that is whole, for sources that are out of reach; such a source is then taken as unchanged.
    ValueError, SourceLost: with what to do.
    """
    found, owner = [], {}
    for spec, _ in parse_sources(config.data):
        try:
            shards = list_shards(Source(spec, None), resolution=config.resolution, scenes=config.scenes, seed=config.seed)
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
    """About `count` usable pictures, cropped square, spread over all shards, to train a VAE on or to look at; and how
    many of those that came along had to be left out, by reason. ValueError where there is none."""
    shards = [shard for _, found in find_shards(config) for shard in found]
    shards = [shards[i * len(shards) // count] for i in range(count)] if len(shards) > count else shards
    recipe, items, faults = make_recipe(config), [], Counter()
    with ThreadPoolExecutor(workers()) as pool:
        for i, shard in enumerate(shards):
            quota, usable = -(-(count - len(items)) // (len(shards) - i)), 0
            try:                                                # a few more than are wanted, for those that cannot be used
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
        raise ValueError(nothing(config, +faults))
    return items, +faults


def nothing(config: Config, faults: Counter) -> str:
    return f"--data {' '.join(config.data)}: not one usable picture in it ({listed(faults) or 'no picture with a caption found'})"


def listed(reasons: Counter) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())


# ---------------------------------------------------------------- the cache's folder


def network_unit(config: Config, vae: AutoencoderKL) -> int:
    """Pixels that the sides of pictures are a multiple of: what the VAE and the network divide by."""
    network = build(DiTConfig, config.dit, "--dit") if config.network == "dit" else build(UNetConfig, config.unet, "--unet")
    return unit_of(network, vae.config.downscale)


def settings_of(config: Config, vae: AutoencoderKL, device: torch.device = torch.device("cpu")) -> dict[str, Any]:
    """What all shards of a cache share; a cache of other settings is never used. device: for the precision it computes in."""
    bf16 = config.dtype == "bf16" or config.dtype == "auto" and native_bf16(device)
    return {"format": FORMAT, "vae": fingerprint(vae), "dtype": "bf16" if bf16 else "fp32", "unit": network_unit(config, vae) if config.buckets else 0,
            "caption_key": list(split_weights(config.caption_key))} | {name: getattr(config, name) for name in SHAPING}


def open_folder(folder: Path, settings: dict[str, Any], made_by: str, rebuild: bool) -> None:
    """Make the cache's folder, or see that the one that is there was made with the same settings.

    ValueError that lists what differs; with `rebuild` the old cache is removed instead.
    """
    file = folder / "settings.json"
    there = read_settings(folder) if file.exists() else {}
    if there and (not rebuild or {name: there.get(name) for name in settings} == settings):
        check_settings(folder, there, settings)                # rebuilt already, perhaps by another process
    else:
        (folder / "index.json").unlink(missing_ok=True)        # first what makes an old cache look whole
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
    """ValueError that lists what differs."""
    def short(value: Any) -> str:
        return value[:8] if isinstance(value, str) and len(value) == 64 else json.dumps(value)

    if differ := [f"{name} {short(found.get(name))} there, {short(value)} here" for name, value in wanted.items()
                  if found.get(name) != value]:
        raise ValueError(f"the latents in {folder} were made with other settings ({'; '.join(differ)}): "
                         "use the same, name another folder, or make them anew with prepare.py --rebuild")


def adopt(config: Config, cache: Cache, vae: AutoencoderKL) -> Config:
    """The config of a run on a finished cache: what the cache decides is taken from it, what must fit is compared.

    --data and --caption-key may give other weights to the cache's sources and keys. ValueError for what does not fit.
    """
    settings, wanted = cache.settings, settings_of(config, vae)
    check_settings(cache.folder, settings, {name: wanted[name] for name in ("format", "vae", "resolution")})
    if settings["buckets"] and settings["unit"] % (unit := network_unit(config, vae)):
        raise ValueError(f"the pictures in {cache.folder} have sides in multiples of {settings['unit']} pixels, this network takes "
                         f"multiples of {unit}: make a cache for it, or use the network it was made for")
    keys = config.caption_key or settings["captions"]
    if list(split_weights(keys)) != settings["caption_key"]:
        raise ValueError(f"--caption-key {' '.join(keys)}: {cache.folder} has {' '.join(settings['caption_key']) or 'the default one'}; "
                         "leave it out, or name the same with other weights")
    data, typed = settings["data"], {source.spec: word for word, source in zip(config.data, parse_sources(config.data))}
    if config.data != PRESETS.get(config.preset, {}).get("data", Config().data):
        if typed.keys() != set(cache.sources):
            raise ValueError(f"--data {' '.join(config.data)}: {cache.folder} was made from {' '.join(data)}; leave it out, or name "
                             "the same with other weights")
        data = [typed[spec] for spec in cache.sources]
    return replace(config, data=data, caption_key=keys, **{name: settings[name] for name in SHAPING})


# ---------------------------------------------------------------- what was read, kept and left out


class Report(NamedTuple):
    """What a cache holds, added up over its shards."""

    shards: int
    broken: int             # of them: archives that end early or are damaged
    read: int
    kept: int
    skipped: Counter        # reason -> samples: faults
    filtered: Counter       # reason -> samples: the user's own limits
    stats: Counter          # sums over all latents

    @property
    def width(self) -> float:
        """The posterior's standard deviation over the latents' own."""
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
    """shard.json's of all shards -> their sum."""
    facts = list(facts)
    sums = {name: sum((Counter(shard[name]) for shard in facts), Counter()) for name in ("skipped", "filtered")}
    stats = Counter()
    for shard in facts:
        stats.update(shard["stats"])
    broken = sum(bool({CUT, DAMAGED}.intersection(shard["skipped"])) for shard in facts)
    return Report(len(facts), broken, sum(shard["read"] for shard in facts), sum(shard["kept"] for shard in facts), stats=stats, **sums)


def judge(config: Config, report: Report, shards: int) -> None:
    """ValueError when too much had to be skipped: of the samples, or of the shards (so many in all), whose lost samples
    nobody can count."""
    for what, bad, of in (("samples", sum(report.skipped.values()), report.read), ("shards", report.broken, shards)):
        if bad > config.max_skip * of:
            raise ValueError(f"{bad:,} of {of:,} {what} had to be skipped or are cut short, more than --max-skip {config.max_skip:g} "
                             f"allows ({listed(report.skipped)}; named in shards/*/skipped.jsonl): mend the data, or raise "
                             "--max-skip: what is encoded stays")


# ---------------------------------------------------------------- the job


def stage_folders(config: Config, base: Path) -> list[tuple[Config, Path]]:
    """Every stage's settings and where its latents are: --cache, else `base`, or `base`-SIZE where sizes follow one another."""
    return [(stage, Path(stage.cache[0]) if stage.cache else base.with_name(f"{base.name}-{stage.resolution}") if config.stages else base)
            for stage in stages(config)]


def prepare(config: Config, folder: Path, vae: AutoencoderKL, device: torch.device, rebuild: bool = False,
            check: Callable[[], None] = lambda: None) -> Report | None:
    """Make the cache of all sources in `folder`, or what is missing of it.

    check: called after every picture; what it raises stops the job. None: other processes are still at work on the last
    shards. ValueError, OSError: with what to do; what is encoded stays, and the same call goes on from there.
    """
    check_size(torch.empty(1, 3, config.resolution, config.resolution, device="meta"), vae.config.downscale)
    settings = settings_of(config, vae, device)
    sources = find_shards(config, finished(folder))
    if folder.exists() and not (folder / "settings.json").exists():
        if others := {path.name for path in folder.iterdir()} - {".writing-settings.json", "claims"}:
            raise ValueError(f"{folder} holds other things ({', '.join(sorted(others)[:3])}) and no cache: name another folder")
    claims = Claims(folder / "claims")
    with claims.held("settings"):
        open_folder(folder, settings, config.vae_weights, rebuild)
    shards, mark = [shard for _, found in sources for shard in found], digest(settings)
    if missing := [shard for shard in shards if not read_shard(folder, shard, mark)]:
        encode_missing(config, folder, vae, device, claims, missing, mark, check)
    facts = [read_shard(folder, shard, mark) for shard in shards]
    if not all(facts):
        return None
    report = add_up(facts)
    if not report.kept:
        raise ValueError(nothing(config, report.skipped + report.filtered))
    judge(config, report, len(shards))
    with claims.held("index"):
        finish(config, folder, [{"spec": spec, "shards": [shard.name for shard in found]} for spec, found in sources])
    claims.close()
    return report


def finish(config: Config, folder: Path, sources: list[dict[str, Any]]) -> None:
    """Write what makes the cache whole, where it is not there yet."""
    settings = read_settings(folder) | {"data": config.data, "captions": config.caption_key}    # for who names only the cache
    there = [{"spec": it["spec"], "shards": [shard["name"] for shard in it["shards"]]} for it in read_sources(folder)]
    names = [name for source in sources for name in source["shards"]]
    if there != sources or Cache(folder).settings != settings:
        rows = [(folder / "shards" / name / "skipped.jsonl").read_text(encoding="utf-8") for name in names]
        write_file(folder / "skipped.jsonl", "".join(rows))
        write_index(folder, settings, sources)
    if others := {path.name for path in (folder / "shards").iterdir()} - set(names):
        print(f"{folder / 'shards'} also holds {len(others)} that --data does not name (any more), such as {min(others)}: "
              "delete them if you like")


def read_sources(folder: Path) -> list[dict[str, Any]]:
    """The sources of a finished cache: [{"spec", "shards": what every shard.json says}]; none where it is not finished."""
    return read_index(folder, missing={"sources": []})["sources"]


def finished(folder: Path) -> dict[str, list[Shard]]:
    """The shards of a finished cache's sources, which can be recognised but not read."""
    return {source["spec"]: [Shard(shard["name"], "", shard["stamp"], True, None) for shard in source["shards"]]
            for source in read_sources(folder)}


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def encode_missing(config: Config, folder: Path, vae: AutoencoderKL, device: torch.device, claims: Claims, missing: list[Shard],
                   mark: str, check: Callable[[], None]) -> None:
    """Encode the shards that nobody else is at. Those whose source fails are left, and named at the end."""
    recipe, facts, lost = make_recipe(config, network_unit(config, vae)), [], []
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with claims.held("index"):
        (folder / "index.json").unlink(missing_ok=True)
    with ThreadPoolExecutor(workers()) as pool, tqdm(unit=" pictures", dynamic_ncols=True, mininterval=1, disable=None) as bar:
        def tick() -> None:
            bar.update()
            check()

        for i in sorted(range(len(missing)), key=lambda i: (i - rank) % world):        # one's own share, then what others left
            shard = missing[i]
            if not claims.take(shard.name) or read_shard(folder, shard, mark):
                continue
            bar.set_description(f"shard {i + 1} of {len(missing)}")
            try:
                replace_folder(folder / "shards" / shard.name, lambda torso: encode_shard(
                    shard, lambda samples: decoded(samples, recipe, pool), lambda place: Encoder(config, vae, device, place),
                    mark, torso, tick))
            except SourceLost as error:
                lost.append(str(error))
                continue
            except OSError as error:
                raise full(error, folder) from error
            facts.append(read_shard(folder, shard, mark))
            if (report := add_up(facts)).read >= FEW:
                judge(config, report, len(missing))
    if lost:
        raise ValueError(f"{len(lost)} of {len(missing)} shards could not be read, the others are encoded: {'; '.join(lost[:3])}")


def full(error: OSError, folder: Path) -> OSError:
    """The same error, with what to do where the disk is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(f"no room left for {folder} ({error.strerror}): finished shards stay; make room and run the same command again")
