"""Judging pictures by number."""
