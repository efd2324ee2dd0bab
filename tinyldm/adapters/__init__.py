"""Small additions to a trained model, in files of their own: LoRA and its relatives, and new words (textual inversion)."""
