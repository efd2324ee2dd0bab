"""Which pipeline class a model folder names."""

import pytest
from small_models import unet_model

from tinyldm import export
from tinyldm.model import told_too
from tinyldm.vendor_loaders import pipelines


@pytest.mark.parametrize("told, name", [
    ((), pipelines.STABLE_DIFFUSION), (("guidance",), pipelines.STABLE_DIFFUSION), (("elapsed",), pipelines.OWN),
    (("guidance", "elapsed"), pipelines.OWN)])
def test_a_network_that_is_told_how_far_it_goes_is_no_model_of_diffusers(told, name):
    """Its pipelines tell a guidance scale (time_cond_proj_dim) and nothing else, and would draw something else in silence."""
    model = unet_model()
    model.net = told_too(model.net, told)
    assert pipelines.for_parts(export.configs(model), "single") == name
    assert export.pipeline_of(model) == name and export.opens_in(export.public(model, None)) == (None if name == pipelines.OWN else name)
