"""The data of a training run: sources of captioned pictures, the embedded data set toyworld, and the cache of latents."""
