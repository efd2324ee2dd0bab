"""Estimates what a run will cost before it begins: FLOPs, memory, hours."""
