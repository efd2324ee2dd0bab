"""Measures this library. `python -m benchmarks --help` is the bench: our side and another library's, in turn. The other scripts are run by
their file names."""
