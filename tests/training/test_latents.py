"""The latents of the second stage: how they are prepared by all processes of a run."""

from types import SimpleNamespace

import pytest

from tinyldm.config import make_config
from tinyldm.training import latents


@pytest.mark.parametrize("compiled", [True, False])
def test_every_picture_size_is_prepared_once_by_processes_that_wait_for_each_other(tmp_path, monkeypatch, capsys, compiled):
    happened = []
    monkeypatch.setattr(latents, "open_vae", lambda config, context: "vae")
    monkeypatch.setattr(latents, "Cache", lambda folder: folder.name)
    monkeypatch.setattr(latents, "prepare", lambda config, folder, vae, device, **more: happened.append((folder.name, more)) or "report")
    check = lambda: None
    context = SimpleNamespace(folder=tmp_path, device="cpu", check=check, world=SimpleNamespace(barrier=lambda: happened.append("barrier")))
    config = make_config(stages={"8": 0.5, "16": 0.5}, compile=compiled)
    assert latents.prepare_latents(config, context, begun=False) == ("vae", ["latents-8", "latents-16"])
    options = dict(check=check, compile=compiled, wait=True)
    assert happened == [("latents-8", options), "barrier", ("latents-16", options), "barrier"] and capsys.readouterr().out == "report\n" * 2
    happened.clear()
    latents.prepare_latents(config, context, begun=True)
    assert not happened
