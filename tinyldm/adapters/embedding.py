"""Textual inversion: a new word whose vectors are learned, while the whole model stays as it is (arXiv:2208.01618).

A token such as `<my-dog>` is added to the tokenizer (text/added_tokens.py), and stands for one or several new rows of a text
encoder's table. In training the rows are a parameter of their own, so that neither the optimizer nor its weight decay can touch the
table: `Embeddings`. To draw, they are written into the table: `apply_embeddings`. A model with several text encoders has rows
in each of them that the file knows, and the others read the token as plain text. The files are read and written in
embedding_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.adapters.embedding_files import read_embedding, save_embedding, split_token
from tinyldm.model import Model
from tinyldm.text.absent import AbsentText
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.text.encoders import TextEncoder, part_name

__all__ = ["Embeddings", "apply_embeddings", "new_embeddings", "read_embedding", "save_embedding", "train_tokens"]


class Embeddings(nn.Module):
    """New rows of ONE text encoder's token table: the parameter `vectors` [count, width], float32.

    encoder, tokenizer  of one part of a model; neither is changed
    token, count        the token to add, and how many vectors it stands for. The further ones are called token_1, token_2 ...
    initial             the words that the vectors start from: n tokens are spread over the vectors, of which there must be n or
                        more; None: the mean of the table

    .tokenizer is the tokenizer with the token. ValueError for a token that exists, and for more initial tokens than vectors.
    """

    def __init__(self, encoder: nn.Module, tokenizer: BaseTokenizer, token: str, initial: str | None = None, count: int = 1):
        super().__init__()
        self._encoder = (encoder,)                          # in a tuple, so that it is not a submodule, and its weights are not ours
        self.token, self.tokenizer = token, tokenizer.with_token(token, count)
        self.first = self.tokenizer.ids_of(token)[0]
        self.vectors = nn.Parameter(initial_vectors(encoder, tokenizer, initial, count))

    def attach(self) -> None:
        """The encoder's table gives these rows for the new ids from now on. Gradients reach them alone, not the table."""
        table = self._encoder[0].token_embedding
        if "forward" in vars(table):
            raise ValueError("new vectors are attached to this text encoder already: detach those first")
        table.forward = lambda ids: self.look_up(table.weight.detach(), ids)    # a hook could not replace ids that are not in the table

    def detach(self) -> None:
        vars(self._encoder[0].token_embedding).pop("forward", None)

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of the table [rows, width] for ids [b, n], those of the new ids from `vectors` -> [b, n, width]."""
        place = ids - self.first
        new = (place >= 0) & (place < len(self.vectors))
        old = F.embedding(ids.masked_fill(new, 0), table)
        return torch.where(new[..., None], F.embedding(place.clamp(0, len(self.vectors) - 1), self.vectors).to(old.dtype), old)


def initial_vectors(encoder: nn.Module, tokenizer: BaseTokenizer, initial: str | None, count: int) -> Tensor:
    """See Embeddings -> [count, width], float32. Words of fewer tokens are spread over the vectors as AUTOMATIC1111 does it."""
    table = encoder.token_embedding.weight.detach()
    if initial is None:
        return table.float().mean(0).repeat(count, 1)
    ids = tokenizer.ids_of(initial)
    if not 1 <= len(ids) <= count:
        fix = f"give the token {len(ids)} vectors, or begin with one word that is one token" if ids else "name a word"
        raise ValueError(f"the initial word '{initial}' is {len(ids)} tokens, for {count} vector{'s' * (count > 1)}: {fix}")
    return table[[ids[i * len(ids) // count] for i in range(count)]].float()


def new_embeddings(model: Model, token: str, initial: str | None = None, count: int = 1,
                   parts: Sequence[str] = ()) -> dict[str, Embeddings]:
    """New vectors for text encoders of a model: of these parts, by default of every CLIP, or else of all that there are."""
    encoders = {part_name(i): encoder for i, encoder in enumerate(model.text.encoders) if not isinstance(encoder.module, AbsentText)}
    wanted = parts or [part for part, encoder in encoders.items() if encoder.tokenizer.published_class == "CLIPTokenizer"] or encoders
    if odd := [part for part in wanted if part not in encoders]:
        raise ValueError(f"the model has no text encoder {odd[0]}: it has {', '.join(encoders)}")
    return {part: Embeddings(*encoders[part], token, initial, count) for part in wanted}


def train_tokens(model: Model, embeddings: Mapping[str, Embeddings]) -> Model:
    """The same model, with tokenizers that know the new token, and with the vectors attached. The networks are the given ones."""
    for new in embeddings.values():
        new.attach()
    return replace(model, text=model.text.with_tokenizers({part: new.tokenizer for part, new in embeddings.items()}))


@torch.no_grad()
def apply_embeddings(model: Model, wanted: Sequence[str | Path], captions: Sequence[str] | None = None) -> list[str]:
    """Add the tokens of these files (each FILE or FILE:TOKEN) and their rows to a loaded model -> the tokens. captions: all that will be
    drawn. ValueError for a file that is not an embedding, or one for another model, for a token that exists already, and for one that
    no caption has."""
    tokens = []
    for each in wanted:
        file, name = split_token(each)
        token, vectors = read_embedding(file, model, name)
        if captions is not None and not any(token.lower() in caption.lower() for caption in captions):
            raise ValueError(f"{file} would change nothing: no caption has its token '{token}'. Write that, or name another one "
                             f"behind the file: {file}:TOKEN")
        for i, (module, tokenizer) in enumerate(model.text.encoders):
            if part_name(i) in vectors:
                known = tokenizer.with_token(token, len(vectors[part_name(i)]))
                grow(module, known.ids_of(token)[0], vectors[part_name(i)])
                model.text.encoders[i] = TextEncoder(module, known)
        tokens.append(token)
    return tokens


def grow(module: nn.Module, first: int, vectors: Tensor) -> None:
    """Write vectors [n, width] into the rows of a text encoder's table from `first` on, where its own tokens end."""
    old = module.token_embedding.weight
    rows = max(len(old), first + len(vectors))
    table = torch.cat([old, old.new_zeros(rows - len(old), old.shape[1])])
    table[first : first + len(vectors)] = vectors.to(table)
    module.token_embedding = nn.Embedding.from_pretrained(table, freeze=not old.requires_grad)
    module.config = replace(module.config, vocab_size=rows)
