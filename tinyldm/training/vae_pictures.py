"""The pictures that an autoencoder is trained on. They lie in a file of the run's folder, of which only the pieces in use are in memory."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tinyldm.config import Config
from tinyldm.data.encoding import make_recipe
from tinyldm.data.prepare import usable_pictures
from tinyldm.files import replace_folder
from tinyldm.random_streams import Stream, seed_sequence
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World

PICTURES = "vae-pictures"               # start of the name of the folder in a run that holds them while the VAE trains
LARGEST_PART = 0.5                      # fraction of the free disk space that they may take
POLL = 0.5                              # seconds between looks at what the main process has written
HELD_OUT = 0.1                          # fraction of the pictures that is held out, at most


def training_pictures(config: Config, context: RunContext, world: World | None = None) -> np.ndarray:
    """The pictures that a VAE trains on, uint8 [n, h, w, 3], cropped square; captions are not needed. They are kept in the run's folder,
    so that a run that is interrupted in its first stage need not decode or draw them again, and goes on with the same ones. Of the
    settings that they depend on, a resumed run may change the number only, which is in the folder's name. Where the disk has too little
    room, they are in memory.

    world: the processes that train the VAE; all of them call this. None: this one alone."""
    world, file = world or World(), context.folder / f"{PICTURES}-{config.autoencoder.pictures}" / "pictures.npy"
    images = read_pictures(file) if world.main else None
    if images is not None:
        print(f"the VAE trains on the same {len(images):,} pictures as before")
    size = config.autoencoder.pictures * 3 * config.data.resolution**2
    on_disk = world.broadcast(images is not None or size < shutil.disk_usage(context.folder).free * LARGEST_PART)
    if not world.main:
        while on_disk and (images := read_pictures(file)) is None:
            context.check(), time.sleep(POLL)
    if images is not None:
        return images
    faults: Counter = Counter()
    usable = usable_pictures(make_recipe(config.data, captioned=False), config, config.autoencoder.pictures, faults, context.signals.check)
    decoded = (item.image for item in usable)
    if on_disk:
        forget_pictures(context.folder)                         # another number of them
        replace_folder(file.parent, lambda partial: write_pictures(partial / file.name, decoded))
    images = read_pictures(file) if on_disk else np.stack([*decoded])
    unusable = f" ({faults.total():,} unusable ones left out)" * bool(faults.total())
    print(f"the VAE trains on {len(images):,} pictures{unusable}")
    return images


def read_pictures(file: Path) -> np.ndarray | None:
    """The pictures in a file, of which only the pieces that are used are read; None where it is missing or damaged."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def write_pictures(file: Path, images: Iterable[np.ndarray]) -> None:
    """Write pictures uint8 [h, w, 3] of one size, at least one, as an array in NumPy's format, without holding all of them in memory.
    Their number is known at the end only; the header is of one length for any number."""
    file.parent.mkdir(parents=True)
    with open(file, "wb") as out:
        out.write(header(0))
        count = 0
        for count, image in enumerate(images, 1):
            out.write(np.ascontiguousarray(image).tobytes())
        out.seek(0)
        out.write(header(count, *image.shape))


def header(*shape: int) -> bytes:
    """The 128 bytes before the data of a uint8 array (numpy.lib.format, version 1.0)."""
    about = str({"descr": "|u1", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(about).to_bytes(2, "little") + about.encode()


def forget_pictures(run: Path) -> None:
    """Remove the pictures that training_pictures keeps in a run's folder."""
    for folder in run.glob(f"*{PICTURES}-*"):                   # half-written ones too
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- what is taken from them


def hold_out(count: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of `count` pictures, cut in two: those that are trained on, and those that never are, spread evenly, as many as are
    wanted but a tenth of all at most."""
    held_out = np.linspace(0, count - 1, min(wanted, int(count * HELD_OUT))).round().astype(int)
    return np.delete(np.arange(count), held_out), held_out


def random_crops(images: np.ndarray, size: int, number: int, seed: int, step: int, kept: np.ndarray | None = None) -> np.ndarray:
    """The batch of a step: `number` crops of size x size pixels (size 0: whole pictures), uint8 [number, size, size, 3]. kept: the
    indices of the pictures that may be chosen; None: all."""
    side = images.shape[1]
    size = min(size or side, side)
    rng = np.random.default_rng(seed_sequence(Stream.CROPS, seed, step))
    chosen = rng.integers(len(images) if kept is None else len(kept), size=number)
    ys, xs = rng.integers(side - size + 1, size=(2, number))
    return np.stack([images[i, y:y + size, x:x + size] for i, y, x in zip(chosen if kept is None else kept[chosen], ys, xs)])


def middle(images: np.ndarray, size: int) -> np.ndarray:
    """The middle of pictures [n, h, w, 3]: crops of size x size pixels (size 0: all of them)."""
    side = images.shape[1]
    size = min(size or side, side)
    start = (side - size) // 2
    return images[:, start:start + size, start:start + size]
