"""Small models of all families, as diffusers writes them, and adapters for one of them."""

import pytest
from small_adapters import trained
from small_models import unet_model

from tinyldm.adapters.files import save_adapter
from tinyldm.folders.save import save_loaded


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function: family -> (its folder, diffusers' pipeline), written the first time."""
    from published import PIPELINES
    memo = {}

    def written(name):
        if name not in memo:
            folder = tmp_path_factory.mktemp(name)
            memo[name] = folder, PIPELINES[name](folder)
        return memo[name]
    return written


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, and two adapters for it."""
    folder, model = tmp_path_factory.mktemp("merge"), unet_model()
    save_loaded(folder / "model", model)
    one = trained(model, 1, net=("attention", "conv"), text=("attention",))
    save_adapter(folder / "a.safetensors", one, model, {"base_model": "model"})
    save_adapter(folder / "b.safetensors", trained(model, 2, net=("attention", "mlp")), model, {}, "kohya")
    return folder
