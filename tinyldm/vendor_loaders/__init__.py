"""Published layouts: names of tensors, config.json and scheduler_config.json, translated to ours and back (layout.py)."""
