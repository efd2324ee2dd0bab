"""Archives, folders and pictures for the tests of data, and helpers that summarise what is read from them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from tinyldm.data.readers import Sample, Skip
from tinyldm.data.sources import Source, list_shards

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"      # real shards, if available
FS = LocalFileSystem()
PAIR = [("a.png", b"A"), ("a.txt", b"one")]
TWO = [*PAIR, ("b.png", b"B"), ("b.txt", b"two")]


def tar(*files, format=tarfile.USTAR_FORMAT):
    """An archive of files, each given as (name, content) or as a TarInfo."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                archive.addfile(file, io.BytesIO(bytes(file.size)) if file.isreg() else None)
            else:
                member = tarfile.TarInfo(file[0])
                member.size = len(file[1])
                archive.addfile(member, io.BytesIO(file[1]))
    return out.getvalue()


def header(name, **fields):
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def reseal(data: bytearray, start=0) -> None:
    """Recompute the checksum of a header that was changed."""
    head = data[start:start + 512]
    data[start + 148:start + 156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 256)


def pairs(*names):
    """An archive of a picture and a caption for each name."""
    return tar(*((name + end, kind + name.encode()) for name in names for end, kind in ((".png", b"picture "), (".txt", b""))))


def skips(out):
    return [(part.key, part.reason) for part in out if isinstance(part, Skip)]


def keys(out):
    return [part.key for part in out if isinstance(part, Sample)]


# ---- sources


def shards(spec, chunk=2048, **kwargs):
    return list_shards(Source(str(spec), None), **{"resolution": 16, "scenes": 5, "seed": 1, "chunk": chunk} | kwargs)


def read(spec, **kwargs):
    return [part for shard in shards(spec, **kwargs) for part in shard.read()]


def refusal(spec):
    with pytest.raises(ValueError) as error:
        shards(spec)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def fill(folder, **files):
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---- pictures


def encode(image, form="PNG", **options) -> bytes:
    data = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(data, form, **options)
    return data.getvalue()


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width, seed=0) -> np.ndarray:
    return np.asarray(Image.fromarray(noise(height // 16, width // 16, 3, seed=seed)).resize((width, height), Image.BICUBIC))


def grey(values) -> np.ndarray:
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1)
