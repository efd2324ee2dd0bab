"""Models on disk: reading and writing model folders, single files, the hub."""
