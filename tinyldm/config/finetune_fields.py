"""The settings of --finetune, which trains a model that exists."""

from __future__ import annotations

from dataclasses import dataclass

from tinyldm.config.setting import fixed, free


@dataclass(frozen=True)
class FinetuneConfig:
    """Which model is trained further, and which part of it."""

    kind: str = fixed("", "train a model that exists: lora, dreambooth, textual_inversion or whole", flag="finetune")
    model: str = fixed("", "--finetune: the model, as for sample.py: a run, a model folder, a file or a hub id. Where --objective is in "
                           "its place, the whole network is trained", also=("teacher",))
    variant: str = fixed("", "--finetune: its weights files, such as fp16 (default: full precision)")
    parts: list = fixed([], "--finetune: for a single file without text encoders or VAE, files, folders or hub ids of these")
    tokenizer: list = fixed([], "--finetune: for a single file, which holds none (default: CLIP's and T5's, from the hub)")
    without_t5: bool = fixed(False, "--finetune: leave out the third text encoder of Stable Diffusion 3")
    train_text: bool = fixed(False, "lora, dreambooth: train the text encoders too")
    rank: int = fixed(0, "rank of the adapter (lora: 16; dreambooth: 0, which trains the whole network)")
    alpha: float | None = fixed(None, "the adapter is scaled by alpha / rank (default: alpha = rank)")
    rank_stabilised: bool = fixed(False, "the adapter is scaled by alpha / sqrt(rank) instead")
    targets: list = fixed(["attention"], "layers with an adapter: attention, mlp, conv, modulation, text (in the text encoders too)")
    conv_rank: int = fixed(0, "rank beside convolutions of more than one pixel, with --targets conv (0: as --rank)")
    ranks: dict = fixed({}, "ranks of single blocks, as BLOCK=RANK: up.2=8 (0: none)")
    lora_dropout: float = free(0.0, "fraction of the adapter's inputs that are dropped")
    instance: str = fixed("", "caption of all pictures, several separated by |: 'a photo of a sks dog' (default: lora: their own; "
                              "textual_inversion: 'a photo of a TOKEN' and the like)")
    class_prompt: str = fixed("", "dreambooth: what the subject is one of, 'a photo of a dog': the model draws pictures of that first, and "
                                  "half of each batch are these, so that it goes on drawing them (default: none)", flag="class")
    class_pictures: int = fixed(100, "dreambooth: how many of these pictures are drawn")
    prior_weight: float = fixed(1.0, "dreambooth: how much a picture of the class counts in the loss, beside one of --data")
    token: str = fixed("", "textual_inversion: the new word, as in <my-dog>")
    initial: str = fixed("", "textual_inversion: the word that it begins as (default: the mean of all)")
    vectors: int = fixed(1, "textual_inversion: how many vectors it stands for")
    style: bool = fixed(False, "textual_inversion: it names the style of the pictures, not their subject")

    @property
    def adapts(self) -> bool:
        """Whether a low-rank adapter is trained."""
        return self.kind in ("lora", "dreambooth") and self.rank > 0

    @property
    def whole(self) -> bool:
        """Whether the network itself is trained."""
        return self.kind == "whole" or self.kind == "dreambooth" and not self.rank

    @property
    def trains_text(self) -> bool:
        """Whether gradients reach the text encoders."""
        return self.kind == "textual_inversion" or self.train_text or self.adapts and "text" in self.targets

    @property
    def groups(self) -> list[str]:
        """The targets of the adapter."""
        return list(dict.fromkeys([*self.targets, *["text"] * self.train_text]))
