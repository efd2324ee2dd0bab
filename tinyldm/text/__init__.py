"""From captions to what a network is conditioned on: tokenizers, prompt weights, text encoders."""
