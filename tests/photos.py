"""Pictures to compare networks and resizes on: photographs where there are some, else scenes of the toy world."""

import io
import tarfile

import numpy as np
from archives import DATA
from PIL import Image

from tinyldm.data import toyworld


def photos(count: int, width: int = 256, height: int = 256) -> np.ndarray:
    """uint8 [count, height, width, 3]."""
    file = DATA / "photos256-000.tar"
    if file.exists():
        with tarfile.open(file) as archive:
            members = (member for member in archive if member.name.endswith(".jpg"))
            images = [Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB") for member, _ in zip(members, range(count))]
    else:
        images = [Image.fromarray(toyworld.sample(i, 256, 0).image) for i in range(count)]
    return np.stack([np.asarray(image.resize((width, height))) for image in images])
