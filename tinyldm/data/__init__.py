"""What feeds training: the embedded data set, picture sources, cached latents."""
