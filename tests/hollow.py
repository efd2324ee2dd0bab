"""Weights of any size that take no room on the disk."""

import json
import struct
from pathlib import Path

import torch


def hollow(file: Path, shapes: dict, dtype: str = "F32") -> None:
    """A safetensors file of zeros whose tensors are a hole. dtype: as safetensors names it."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * {"F32": 4, "F16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)
