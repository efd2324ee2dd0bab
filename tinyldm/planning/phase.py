"""The plan of one phase of a run: what it computes, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tinyldm.config import Config
from tinyldm.models.tiling import PIXELS_AT_ONCE
from tinyldm.planning.flops import passes, size
from tinyldm.planning.memory import CASTS, EAGER, GRADIENTS, RESERVE, memory

GRID_PICTURES = 16          # pictures in a sample grid: about 8 prompts, two of each


@dataclass(frozen=True)
class PlannedPhase:
    """The plan of one phase: the first stage, the second stage at one picture size, or the only stage of a CLIP."""

    name: str
    config: Config                  # the settings of this phase
    batch: int
    micro: int                      # the largest micro-batch
    trained: dict[str, nn.Module]
    frozen: int                     # bytes of frozen networks on the GPU
    flops: dict[str, int]           # per image, by part: three times those of the forward pass where the part is trained
    saved: dict[str, float]         # bytes of activations per image under torch.compile, by trained part, an estimate
    casts: int                      # bytes of the casts of weights
    peaks: dict[str, int]           # bytes per image of forward passes without gradients, by part
    batch_bytes: int                # per image of a batch on the GPU: x0, noise, and the features of frozen text encoders
    cache_bytes: int = 0            # bytes per picture on disk; 0: it trains on pictures, as the first stage does
    steps: int = 0
    encoding: float = 0.0           # hours of encoding the latents, a projection
    compiled: bool = False          # whether the network and the VAE's encoder are compiled
    repeated: float = 0.0           # FLOPs per image of forward passes that are taken a second time, beside those of checkpointing
    compared: int = 0               # bytes of comparing the samples of a batch with each other, an estimate

    @property
    def useful(self) -> int:
        """FLOPs of training on one image."""
        return sum(self.flops[part] for part in (("net", "text") if self.cache_bytes else self.flops))

    @property
    def rate(self) -> float:
        """Images per second, a projection. The utilisation counts everything that the GPU computes, including the forward passes
        that gradient checkpointing repeats, which the model FLOPs utilisation (MFU) does not count."""
        recomputed = self.flops["net"] / passes(self.config)["net"] if self.cache_bytes and self.config.network.grad_checkpointing else 0
        return self.config.plan.utilisation * self.config.plan.gpu_tflops * 1e12 / (self.useful + recomputed + self.repeated)

    @property
    def hours(self) -> float:
        return self.steps * self.batch / self.rate / 3600

    @property
    def activations(self) -> float:
        """Bytes of activations per image, an estimate. Of all networks only `net` may be compiled."""
        return sum(count * (1 if part == "net" and self.compiled else EAGER) for part, count in self.saved.items())

    def memory(self, micro: int | None = None) -> dict[str, float]:
        """Bytes on the GPU while training, by kind."""
        saved = self.activations * (self.micro if micro is None else micro)
        kinds = memory(self.config, self.trained, self.frozen, saved, self.casts, 2 * self.batch * self.batch_bytes)
        return kinds | ({"comparison of all pairs (estimate)": self.compared} if self.compared else {})

    def memory_gb(self, micro: int | None = None) -> float:
        """Total memory on the GPU in GB while training."""
        return sum(self.memory(micro).values()) / 1e9

    def encoding_gb(self, vae: nn.Module) -> float:
        """Memory in GB while latents are made, --encode-batch-size pictures at once, an estimate."""
        return (4 * size(vae) + self.config.data.encode_batch_size * self.peaks["encode"] + RESERVE) / 1e9

    def grid_gb(self) -> float:
        """Memory in GB while a sample grid is drawn, an estimate: what training keeps between two steps, and the larger one of the
        network's memory (guidance doubles the pictures) and the decoder's."""
        kept = sum(size for kind, size in self.memory(0).items() if kind not in (CASTS, GRADIENTS))
        decoded = max(1, min(GRID_PICTURES, PIXELS_AT_ONCE // self.config.data.resolution**2))
        return (kept + max(2 * GRID_PICTURES * self.peaks["net"], decoded * self.peaks["decode"])) / 1e9
