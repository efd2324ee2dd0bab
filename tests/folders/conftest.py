import pytest
from safetensors import safe_open

from tinyldm.folders import weights


@pytest.fixture
def tensors_read(monkeypatch):
    """The names of the tensors that are read from safetensors files, in this order."""
    names = []

    class Noted:
        def __init__(self, *args, **kwargs):
            self.handle = safe_open(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def get_tensor(self, name):
            names.append(name)
            return self.handle.get_tensor(name)

    monkeypatch.setattr(weights, "safe_open", Noted)
    return names
