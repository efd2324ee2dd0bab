"""Tests run in several processes (pytest-xdist), each with a thread of its own: more threads would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                   # before torch is imported
