"""A model on disk: folders read and written, single files, the hub."""
