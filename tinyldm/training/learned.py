"""What was learned beside a model, added to it for drawing: --lora and --embedding of all scripts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from tinyldm.adapters.embedding import apply_embeddings
from tinyldm.adapters.merge import apply_adapters
from tinyldm.model import Model
from tinyldm.training.portable import portable
from tinyldm.training.run_folder import find_learned


def apply_learned(model: Model, args: Namespace, captions: Sequence[str] | None = None) -> list[str]:
    """Add the adapters and words that the flags name to a loaded model, in place -> the words. captions: all that will be drawn.
    ValueError for the first that does not fit, and for a word that no caption has."""
    apply_adapters(model, [each._replace(path=find_learned(each.path)) for each in args.lora])
    return apply_embeddings(model, [*map(find_learned, args.embedding)], captions)


def learned_facts(args: Namespace) -> dict[str, str]:
    """What was added, as a picture's settings name it."""
    return {"LoRA": " ".join(str(each._replace(path=portable(each.path))) for each in args.lora),
            "Embeddings": " ".join(map(portable, args.embedding))}
