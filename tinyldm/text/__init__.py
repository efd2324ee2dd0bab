"""Turns captions into a network's conditions: tokenizers, prompt weights, text encoders."""
