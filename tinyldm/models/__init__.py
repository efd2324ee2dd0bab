"""Networks: one per file, plain nn.Modules with dataclass configs."""
