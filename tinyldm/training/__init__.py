"""What a training run needs beside its networks: EMA, optimizer, checkpoints, log."""
