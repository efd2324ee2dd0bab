import pytest
from archives import FS

from tinyldm.data.readers import read_tar


@pytest.fixture
def read(tmp_path):
    """All that comes out of the bytes of an archive."""
    def read(data, name="a.tar"):
        (tmp_path / name).write_bytes(data)
        return list(read_tar(FS, str(tmp_path / name), len(data)))
    return read
