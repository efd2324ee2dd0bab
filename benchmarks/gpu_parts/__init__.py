"""The parts of benchmarks/gpu.py, one file for each group of checks. Each part runs in a process of its own."""
