"""The job that runs before training: decode every captioned picture, encode it with the VAE, and store it in a cache.

The job works shard by shard. A shard's folder gets its final name only when all of it is encoded and flushed to the disk, and
the cache's index is written after the last shard. So a job that is killed at any moment loses only the shard in progress, and an
unfinished cache is never mistaken for a finished one. Any number of processes, on any hosts that share the disk, may run the
same command: each takes shards that no other process has taken (torchrun's ranks begin with different ones), and the last
process to finish writes the index.

A job that was killed ten times and restarted makes the same cache as one that was never interrupted: on a CPU byte for byte, on a GPU
but for the last bits of the latents, because cuDNN and Triton choose between algorithms by timing them. The last bits also depend on
whether the autoencoder is compiled, and on how many pictures are encoded at once, which becomes less when memory runs out: what fits
is noted in the cache's folder, so that a restart begins with it. None of that is part of the settings that a cache must match.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinyldm.config import PRESETS, Config, DataConfig, change, flatten, phases, split_weights
from tinyldm.data.cache import Cache, read_index, write_index
from tinyldm.data.cache_folder import NEWER, check_folder, check_settings, open_folder, read_settings
from tinyldm.data.encoding import (
    CHUNK,
    BatchSize,
    CompiledVAE,
    Encoder,
    Item,
    Recipe,
    decoded,
    encode_shard,
    fingerprint,
    make_recipe,
    read_shard,
    workers,
)
from tinyldm.data.moved import by_content, content_of, reuse
from tinyldm.data.readers import Damaged, Sample, Skip
from tinyldm.data.remote import SourceLost
from tinyldm.data.report import Report, add_up, judge, nothing_usable, print_sizes
from tinyldm.data.sources import Shard, Source, list_shards, parse_sources
from tinyldm.device import native_bf16
from tinyldm.files import Claims, replace_folder, write_file
from tinyldm.model import NETWORKS, network_config
from tinyldm.models.vae import AutoencoderKL, check_size

FORMAT = 1                      # version of the cache's files and of decoding and cropping: a cache of another version is refused
SHAPING = ("resolution", "buckets", "flip", "moments", "min_side", "max_aspect", "min_caption", "max_caption")
FEW = 1000                      # samples after which a job that skips too many of them is stopped early
POLL = 2.0                      # seconds between looks at what other processes have finished


def find_shards(data: DataConfig, seed: int, finished: dict[str, list[Shard]] | None = None) -> list[tuple[str, list[Shard]]]:
    """Every source as (its spec without the weight, its shards).

    finished: {spec: shards} of a finished cache. A source that cannot be reached but is in it is taken to be unchanged.
    ValueError, SourceLost: with what to do.
    """
    found, owner = [], {}
    for (spec, _), texts in zip_longest(parse_sources(data.sources), data.captions, fillvalue=""):
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
        key = next(iter(split_weights(data.caption_key)), "txt")
        found.append((spec, [with_captions(shard, key, texts.split("|")) for shard in shards] if texts else shards))
    return found


def with_captions(shard: Shard, key: str, texts: Sequence[str]) -> Shard:
    """The same shard with these captions, under this key, for each of its pictures, whatever captions it has."""
    def read() -> Iterator[Sample | Skip]:
        for sample in shard.read():
            yield sample._replace(fields={key: list(texts)}) if isinstance(sample, Sample) else sample

    mark = " " + hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
    return replace(shard, stamp=shard.stamp + mark, read=read, content=shard.content and (lambda: shard.content() + mark))


def some_pictures(config: Config, count: int, check: Callable[[], None] = lambda: None) -> tuple[list[Item], Counter]:
    """About `count` usable pictures to look at, as usable_pictures() takes them, and how many others had to be left out, by reason."""
    faults: Counter = Counter()
    return [*usable_pictures(make_recipe(config.data), config, count, faults, check)], +faults          # +: without zero counts


def usable_pictures(recipe: Recipe, config: Config, count: int, faults: Counter,
                    check: Callable[[], None] = lambda: None) -> Iterator[Item]:
    """Yield about `count` usable pictures, taken evenly from all shards; never more. Others are counted in `faults`, by reason. check:
    called after each. ValueError where none is usable."""
    shards = [shard for _, found in find_shards(config.data, config.run.seed) for shard in found]
    shards = [shards[i * len(shards) // count] for i in range(count)] if len(shards) > count else shards
    found = 0
    with ThreadPoolExecutor(workers()) as pool:
        for i, shard in enumerate(shards):
            quota, usable = -(-(count - found) // (len(shards) - i)), 0
            try:                                                # read a few more than the quota, as some may not be usable
                for item in decoded(islice(shard.read(), quota + quota // 4 + CHUNK), recipe, pool):
                    check()
                    if usable == quota:
                        break
                    faults[item.reason] += item.image is None
                    if item.image is not None:
                        usable, found = usable + 1, found + 1
                        yield item
            except (Damaged, ValueError) as error:
                faults[f"whole shard: {error}"] += 1
    if not found:
        raise ValueError(nothing_usable(config.data, +faults))


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
            "caption_key": list(split_weights(config.data.caption_key))} | {name: getattr(config.data, name) for name in SHAPING} | {
                name: value for name in NEWER if (value := getattr(config.data, name))}


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
    made = {name: settings[name] for name in SHAPING} | {name: settings.get(name, 0) for name in NEWER}
    usual, own = flatten(Config()) | PRESETS.get(config.run.preset, {}), flatten(config)
    for name, value in made.items():
        if own[name] not in (usual[name], value):
            raise ValueError(f"--{name.replace('_', '-')} {own[name]}: the pictures in {cache.folder} were encoded with {value}; leave it "
                             "out, or make a cache so")
    data, typed = settings["data"], {source.spec: word for word, source in zip(config.data.sources, parse_sources(config.data.sources))}
    if config.data.sources and config.data.sources != PRESETS.get(config.run.preset, {}).get("data", DataConfig().sources):
        if typed.keys() != set(cache.sources):
            raise ValueError(f"--data {' '.join(config.data.sources)}: {cache.folder} was made from {' '.join(data)}; leave it out, or "
                             "name the same with other weights")
        data = [typed[spec] for spec in cache.sources]
    return change(config, data=data, caption_key=keys, **made)


# ---------------------------------------------------------------- the job


def phase_folders(config: Config, base: Path) -> list[tuple[Config, Path]]:
    """The config of every phase and the folder of its latents: --cache, else `base`, or `base`-SIZE where there are several."""
    several = bool(config.data.phases)
    own = lambda phase: base.with_name(f"{base.name}-{phase.data.resolution}") if several else base
    return [(phase, Path(phase.data.cache[0]) if phase.data.cache else own(phase)) for phase in phases(config)]


def prepare(config: Config, folder: Path, vae: AutoencoderKL, device: torch.device, rebuild: bool = False,
            check: Callable[[], None] = lambda: None, compile: bool = False, wait: bool = False) -> Report | None:
    """Make the cache of all sources in `folder`, or the missing part of an unfinished one.

    check: called after every picture; an exception from it stops the job. compile: encode with torch.compile. wait: while other
    processes encode the last shards, wait for them, and encode the shards of those that die; otherwise None is returned then.
    ValueError, OSError: with what to do. Encoded shards are kept, and the same call continues there.
    """
    check_size(torch.empty(1, 3, config.data.resolution, config.data.resolution, device="meta"), vae.config.downscale)
    settings = settings_of(config, vae, device)
    sources = find_shards(config.data, config.run.seed, finished_shards(folder))
    check_folder(folder)
    claims = Claims(folder / "claims", int(os.environ.get("WORLD_SIZE", 1)))
    with claims.held("settings"):
        open_folder(folder, settings, config.autoencoder.weights, rebuild)
    shards, mark = [shard for _, found in sources for shard in found], digest(settings)
    is_done = lambda shard: bool(read_shard(folder, shard, mark))
    if missing := [shard for shard in shards if not is_done(shard)]:
        print_sizes(missing, config.data)
        with claims.held("index"):
            (folder / "index.json").unlink(missing_ok=True)
        size = BatchSize(folder, config.data.encode_batch_size, claims)
        encoder = partial(Encoder, config.data, config.run.dtype, CompiledVAE(vae, size) if compile else vae, device, size)
        recipe = make_recipe(config.data, picture_divisor(config, vae))
        encode_missing(config.data, folder, recipe, encoder, to_encode(missing, is_done, claims, wait, check), len(missing), mark, check)
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


def finished_shards(folder: Path) -> dict[str, list[Shard]]:
    """{spec: shards} of a finished cache. These shards have a name and a stamp, but cannot be read."""
    return {source["spec"]: [Shard(shard["name"], "", shard["stamp"], True, None) for shard in source["shards"]]
            for source in read_sources(folder)}


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def to_encode(missing: list[Shard], is_done: Callable[[Shard], bool], claims: Claims, wait: bool,
              check: Callable[[], None]) -> Iterator[tuple[int, Shard]]:
    """Yield the missing shards, with their numbers, that no other process has taken. wait: go on until the others have finished
    theirs. The shards of one that died are free again, as the system releases its claims."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    left = sorted(range(len(missing)), key=lambda i: (i - rank) % world)                # this rank's own shards first
    while left:
        for i in [*left]:
            if claims.take(missing[i].name):
                left.remove(i)
                if not is_done(missing[i]):
                    yield i, missing[i]
        if not wait:
            return
        if left := [i for i in left if not is_done(missing[i])]:
            check()
            time.sleep(POLL)


def encode_missing(data: DataConfig, folder: Path, recipe: Recipe, encoder: Callable[[Path], Encoder], todo: Iterable[tuple[int, Shard]],
                   of: int, mark: str, check: Callable[[], None]) -> None:
    """Encode shards, `of` at most. ValueError, at the end, that names those that cannot be read."""
    facts, lost, done = [], [], by_content(folder, mark)
    with ThreadPoolExecutor(workers()) as pool, tqdm(unit=" pictures", dynamic_ncols=True, mininterval=1, disable=None) as bar:
        def tick() -> None:
            bar.update()
            check()

        def fill(new_folder: Path) -> None:
            if not ((content := content_of(shard)) in done and reuse(done[content], shard, new_folder)):
                encode_shard(shard, lambda samples: decoded(samples, recipe, pool), encoder, mark, new_folder, tick, content)

        for i, shard in todo:
            bar.set_description(f"shard {i + 1} of {of}")
            try:
                replace_folder(folder / "shards" / shard.name, fill)
            except SourceLost as error:
                lost.append(str(error))
                continue
            except OSError as error:
                raise explain_full_disk(error, folder) from error
            facts += filter(None, [read_shard(folder, shard, mark)])       # nothing where another process is just replacing it
            if (report := add_up(facts)).read >= FEW:
                judge(data, report, of)
    if lost:
        raise ValueError(f"{len(lost)} of {of} shards could not be read, the others are encoded: {'; '.join(lost[:3])}")


def explain_full_disk(error: OSError, folder: Path) -> OSError:
    """An error with what to do where the disk is full; other errors unchanged."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(f"no room left for {folder} ({error.strerror}): finished shards are kept; make room and run the same command again")
