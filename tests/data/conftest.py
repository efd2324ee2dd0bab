"""Fixtures that are used by several test files."""

from pathlib import Path

import pytest
from archives import FS

from tinyldm.data import prepare
from tinyldm.data.readers import read_tar


@pytest.fixture
def read(tmp_path):
    """A function that returns everything that read_tar yields for the bytes of an archive."""
    def read(data, name="a.tar"):
        (tmp_path / name).write_bytes(data)
        return list(read_tar(FS, str(tmp_path / name), len(data)))
    return read


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """A list to which the file name of every shard is appended when it is encoded."""
    names, real = [], prepare.encode_shard

    def record(shard, *rest):
        names.append(Path(shard.url).name)
        return real(shard, *rest)

    monkeypatch.setattr(prepare, "encode_shard", record)
    return names
