"""Tests run in several processes (pytest-xdist), each with a thread of its own: more threads would wait for each other."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")                   # before torch is imported


@pytest.fixture(autouse=True)
def attention_by_kernels(monkeypatch):
    """As in a new process, whatever train.py has switched on in an earlier test of this one."""
    from tinyldm.models import layers
    monkeypatch.setattr(layers, "_plain", False)
