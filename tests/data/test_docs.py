"""The worked example of docs/data.md, executed from the file."""

import re

import numpy as np
import pytest
from archives import refusal
from helpers import ROOT
from preparing import run, settings

from tinyldm.data import sources
from tinyldm.data.sources import Source, list_shards, parse_sources


@pytest.fixture
def noise_source(monkeypatch):
    """Execute the example with a copy of the table of sources."""
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text("utf-8"), re.DOTALL)
    exec(code, {"__name__": "noise_source"})


def test_a_kind_of_source_from_outside_is_listed_read_and_weighted(noise_source):
    [shard] = list_shards(Source("noise:8", None), resolution=16, scenes=5, seed=1)
    samples = list(shard.read())
    assert len(samples) == 8 and samples[3].fields == {"text": "noise number 3"} and samples[3].picture.shape == (16, 16, 3)
    assert [source.spec for source in parse_sources(["noise:8"])] == ["noise:8"]
    assert [(spec, str(weight)) for spec, weight in parse_sources(["noise:8:0.3", "toyworld:0.7"])] == [
        ("noise:8", "3/10"), ("toyworld", "7/10")]
    assert "what is read: toyworld, noise:N (N pictures of noise), a folder" in refusal("nowhere")


def test_a_cache_is_prepared_from_a_kind_of_source_from_outside(noise_source, tmp_path):
    cache = run(settings(tmp_path, data=["noise:8"], resolution=16), tmp_path / "cache")
    assert len(cache) == 8 and cache.sources == ["noise:8"] and list(cache.all_captions()) == [f"noise number {i}" for i in range(8)]
    assert len(np.unique(cache.latents(np.arange(8)).reshape(8, -1), axis=0)) == 8
