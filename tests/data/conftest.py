"""Fixtures that several files share."""

from pathlib import Path

import pytest
from archives import FS

from tinyldm.data import prepare
from tinyldm.data.readers import read_tar


@pytest.fixture
def read(tmp_path):
    """All that comes out of the bytes of an archive."""
    def read(data, name="a.tar"):
        (tmp_path / name).write_bytes(data)
        return list(read_tar(FS, str(tmp_path / name), len(data)))
    return read


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Names of the shards that are encoded."""
    names, real = [], prepare.encode_shard

    def noted(shard, *rest):
        names.append(Path(shard.url).name)
        return real(shard, *rest)

    monkeypatch.setattr(prepare, "encode_shard", noted)
    return names
