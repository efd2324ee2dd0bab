"""The bench behind `python -m benchmarks`: compare.py is its engine, the tables of cases are in training, forward, drawing and loading."""
