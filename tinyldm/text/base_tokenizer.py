"""What the tokenizers of all text encoders have in common: captions in, rows of token ids out.

A tokenizer is a pipeline of the library `tokenizers` that puts an end behind each caption. Tokens that were added to a published
vocabulary (added_tokens.py) are found before the rest of the pipeline, and one that stands for several vectors is written out as
diffusers' pipelines do.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as tk

from tinyldm.text.added_tokens import Published, flags, read_published
from tinyldm.unicode import check_unicode


class BaseTokenizer(ABC):
    """Rows are `context_length` ids long, filled up with `pad_token`. added: tokens that are one id wherever a caption contains them;
    those that the vocabulary lacks are numbered from its end on, in this order."""

    published_class: str            # tokenizer_class of tokenizer_config.json
    names: Mapping[str, str]        # the special tokens that every such vocabulary has, by their names in that file
    ids_before: int                 # ids of a row that come before those of its caption
    default_length: int             # of context_length, where a folder does not say it

    def __init__(self, backend: tk.Tokenizer, context_length: int, pad_token: str, added: Sequence[tk.AddedToken]):
        """backend: without special tokens."""
        if context_length < self.ids_before + 2:
            raise ValueError(f"context_length {context_length} leaves no room beside {' and '.join(['BOS'] * self.ids_before + ['EOS'])}: "
                             f"use {self.ids_before + 2} or more")
        tokens, special = {token.content: token for token in added}, dict.fromkeys([*self.names.values(), pad_token])
        if missing := [token for token in special if backend.token_to_id(token) is None and token not in tokens]:
            kind = self.published_class.removesuffix("Tokenizer")
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}: is it a {kind} vocabulary?")
        self._backend, self.context_length, self.pad_token = backend, context_length, pad_token
        backend.add_tokens(list((tokens | {token: tokens.get(token, special_token(token)) for token in special}).values()))
        self.added = dict(sorted(backend.get_added_tokens_decoder().items()))            # id -> token; the special ones too
        self.eos_token_id, self.pad_token_id = map(backend.token_to_id, (self.names["eos_token"], pad_token))
        backend.enable_truncation(context_length)        # truncated rows still have their end
        backend.enable_padding(length=context_length, pad_id=self.pad_token_id, pad_token=pad_token)
        contents = {token.content for token in self.added.values()}
        self._vectors = _several_vectors(contents)
        names = sorted({*contents, *self._vectors.values()}, key=len, reverse=True) if self._vectors else []
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")

    @abstractmethod
    def contents(self) -> list:
        """The vocabulary, in JSON: all that determines a caption's ids but for lengths, padding and added tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of ids, those of added tokens included: a text encoder needs as many embeddings, or more."""

    @abstractmethod
    def with_added(self, added: Sequence[tk.AddedToken]) -> BaseTokenizer:
        """The same vocabulary, lengths and padding with these added tokens."""

    def with_token(self, token: str, count: int = 1) -> BaseTokenizer:
        """A tokenizer that has a further token of `count` vectors, `token`, `token_1` and so on, with the next ids. ValueError for a
        token that exists already, or that would change what an added token stands for."""
        if count < 1:
            raise ValueError(f"the token '{token}' has {count} vectors: it needs at least 1")
        if token != token.strip() or not token:
            raise ValueError(f"the token '{token}' must not be empty, and not begin or end with white space")
        check_unicode(token)
        vocab, new = self._backend.get_vocab(with_added_tokens=True), [token, *(f"{token}_{i}" for i in range(1, count))]
        if known := [name for name in new if name in vocab or len(self.ids_of(name)) == 1]:
            raise ValueError(f"the token '{known[0]}' exists already in the model's tokenizer: give it another name, such as "
                             f"'<my-{known[0].strip('<>')}>'")
        longer = self.with_added([*self.added.values(), *map(tk.AddedToken, new)])
        ours = {token: " ".join(new)} if count > 1 else {}
        if changed := [name for name, row in longer._vectors.items() if row != (self._vectors | ours).get(name)]:
            raise ValueError(f"the token '{token}' would be taken for a further vector of '{changed[0]}': give it another name")
        return longer

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text alone, without BOS, EOS and padding."""
        row = self._backend.encode(self._written_out(text)[0], add_special_tokens=False)
        return row.ids[:sum(row.attention_mask)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that determines a caption's ids: vocabulary, context length, padding, added tokens."""
        content = [*self.contents(), self.context_length, self.pad_token]
        content += [self._own_tokens()] if self._own_tokens() else []           # token files in older caches are named after the rest
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _own_tokens(self) -> dict[int, dict]:
        """The added tokens in JSON, by id, but for the special ones where these are as in every tokenizer."""
        usual = [flags(special_token(token)) for token in (*self.names.values(), self.pad_token)]
        return {i: found for i, token in self.added.items() if (found := flags(token)) not in usual}

    def encode(self, texts: list[str]) -> np.ndarray:
        """Captions -> int64 [b, context_length]: tokens (truncated where too long), EOS, padding, with CLIP a BOS before them.
        ValueError for text that is not Unicode."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of captions: pass [text]")
        rows = [row.ids for row in self._backend.encode_batch_fast([self._written_out(text)[0] for text in texts])]
        return np.array(rows, dtype=np.int64).reshape(-1, self.context_length)

    def cut(self, text: str) -> str:
        """The end of `text` that `encode` cuts off; '' where all of it fits."""
        written, places = self._written_out(text)
        overflowing = self._backend.encode(written).overflowing
        return text[places[overflowing[0].offsets[self.ids_before][0]]:].strip() if overflowing else ""

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each position of the row, the characters [start, end) of `text` that it stands for; (0, 0) for BOS, EOS and padding."""
        written, places = self._written_out(text)
        return [(places[start], places[end - 1] + 1) if end > start else (0, 0) for start, end in self._backend.encode(written).offsets]

    def _written_out(self, text: str) -> tuple[str, Sequence[int]]:
        """The text with the other vectors of a token behind it where only its first is named (`<my-dog>` -> `<my-dog> <my-dog>_1`),
        and for each character of the result its index in `text`; those that were written in have that of their token's first."""
        check_unicode(text)
        written, places, end = "", [], 0
        for found in self._names.finditer(text):
            written += text[end:found.start()] + self._vectors.get(found[0], found[0])
            places += [*range(end, found.end())]
            places += [found.start()] * (len(written) - len(places))
            end = found.end()
        return (written + text[end:], [*places, *range(end, len(text))]) if end else (text, range(len(text)))

    @classmethod
    def read_settings(cls, folder: Path, tokenizer: Mapping[str, Any], context_length: int | None) -> tuple[Published, int]:
        """What the files of a folder say beside the vocabulary, and the context length: the given one, or else theirs.
        tokenizer: the content of tokenizer.json."""
        names = ("tokenizer_config", "special_tokens_map", "added_tokens")
        published = read_published(*(read_optional_json(folder / f"{name}.json") for name in names), tokenizer)
        length = int(published.config.get("model_max_length") or cls.default_length)
        length = cls.default_length if length > 1e6 else length         # transformers writes 1e30 for an unknown length
        return published, context_length or length

    def check_places(self, published: Published, folder: Path) -> None:
        """ValueError where an added token has another id here than the folder gives it."""
        for i, token in published.listed.items():
            if (found := self._backend.token_to_id(token.content)) != i:
                raise ValueError(f"{folder} gives the added token '{token.content}' the id {i}, but its place is {found}: added tokens "
                                 "are numbered from the end of the vocabulary on, without gaps")

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` and from_pretrained of transformers' class read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {**self.names, "pad_token": self.pad_token}
        config = names | {"tokenizer_class": self.published_class, "model_max_length": self.context_length} | self.config_fields()
        tokenizer = json.loads(self._backend.to_str()) | {"truncation": None, "padding": None}     # set by the caller in transformers
        files = {"tokenizer": tokenizer, "tokenizer_config": config, "special_tokens_map": names}
        if self._own_tokens():                           # tokenizer.json has them too; these are for who does not read that
            vocab = self._backend.get_vocab(with_added_tokens=False)
            config["added_tokens_decoder"] = {str(i): flags(token) for i, token in self.added.items()}
            files["added_tokens"] = {token.content: i for i, token in self.added.items() if token.content not in vocab}
        for name, content in files.items():
            write_json(folder / f"{name}.json", content)

    def config_fields(self) -> dict:
        """Further fields of tokenizer_config.json."""
        return {}


def special_token(token: str) -> tk.AddedToken:
    return tk.AddedToken(token, special=True)


def read_optional_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _several_vectors(tokens: Collection[str]) -> dict[str, str]:
    """For tokens of several vectors, such as `<my-dog>` with `<my-dog>_1` and `<my-dog>_2`: all of them with spaces between."""
    rows = {token: [token, *takewhile(tokens.__contains__, (f"{token}_{i}" for i in count(1)))] for token in tokens}
    return {token: " ".join(row) for token, row in rows.items() if len(row) > 1}
