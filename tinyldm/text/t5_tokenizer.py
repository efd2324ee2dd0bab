"""T5's tokenizer, with a published vocabulary or one trained here.

A caption is split at white space, each word begins with "▁", and is cut into the pieces whose probabilities have the largest product
(arXiv:1804.10959). Behind the pieces of a published vocabulary come 100 tokens that stand for gaps in a text, `<extra_id_99>` down to
`<extra_id_0>`. All rules are those of transformers' T5Tokenizer (version 5), so a folder written by `save` opens there and gives the
same ids. Published folders have tokenizer.json, or only spiece.model (sentencepiece.py).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers as tk

from tinyldm.files import INCOMPLETE
from tinyldm.text.base_tokenizer import BaseTokenizer, read_optional_json, special_token
from tinyldm.text.sentencepiece import USER_DEFINED, read_sentencepieces

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"             # with the ids 0, 1 and 2
SPIECE = "spiece.model"
GAPS = 100                                               # how many <extra_id_i> there are unless tokenizer_config.json says otherwise
ASCII = [chr(code) for code in range(ord("!"), ord("~") + 1)]
Pieces = list[tuple[str, float]]                         # text and score (a log-probability), by id


class T5Tokenizer(BaseTokenizer):
    """Unigrams (`pieces`). charsmap: how characters are normalised first, in SentencePiece's form; b"": not at all."""

    published_class, ids_before, default_length = "T5Tokenizer", 0, 512
    names = MappingProxyType({"eos_token": EOS, "unk_token": UNKNOWN})

    def __init__(self, pieces: Pieces, charsmap: bytes = b"", context_length: int = 512, pad_token: str = PAD,
                 added: Sequence[tk.AddedToken] = ()):
        if [text for text, _ in pieces[:3]] != [PAD, EOS, UNKNOWN]:
            raise ValueError(f"the vocabulary does not begin with {PAD}, {EOS}, {UNKNOWN}: is it a T5 vocabulary?")
        self.pieces, self.charsmap = pieces, charsmap
        super().__init__(_pipeline(pieces, charsmap), context_length, pad_token, added)
        self._backend.post_processor = tk.processors.TemplateProcessing(
            single=["$A", EOS], pair=["$A", EOS, "$B", EOS], special_tokens=[(EOS, self.eos_token_id)])

    def __len__(self) -> int:
        return 1 + max(len(self.pieces) - 1, *self.added)

    def with_added(self, added: Sequence[tk.AddedToken]) -> T5Tokenizer:
        return T5Tokenizer(self.pieces, self.charsmap, self.context_length, self.pad_token, added)

    def contents(self) -> list:
        return [self.pieces, base64.b64encode(self.charsmap).decode()]

    def config_fields(self) -> dict:
        return {"extra_ids": sum(token.content.startswith("<extra_id_") for token in self.added.values())}

    @classmethod
    def check_size(cls, vocab_size: int) -> None:
        """ValueError for a vocabulary that is too small to be trained."""
        if vocab_size < (least := len(ASCII) + 4):
            raise ValueError(f"vocab_size {vocab_size} is below the {least} that every English text needs")

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = 512) -> T5Tokenizer:
        """A vocabulary of at most `vocab_size` ids from captions, without <extra_id_i>; the same captions always give the same one.
        All of ASCII is in it, and of other characters those that occur."""
        cls.check_size(vocab_size)
        trainer = tk.trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS, UNKNOWN], unk_token=UNKNOWN,
                                             initial_alphabet=ASCII, show_progress=False)
        unigram = _pipeline([], b"")
        unigram.train_from_iterator(captions, trainer)
        special, pieces = (found := json.loads(unigram.to_str())["model"]["vocab"])[:3], found[3:]
        return cls([*map(tuple, special), *_reproducible(pieces)], context_length=context_length)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the files of a folder, or a single one, are those of such a tokenizer."""
        if not path.is_dir():
            return path.suffix == ".model"
        described = read_optional_json(path / "tokenizer.json").get("model", {})
        return described.get("type") == "Unigram" if described else (path / SPIECE).exists()

    @classmethod
    def load(cls, path: str | Path, context_length: int | None = None, pad_token: str | None = None) -> T5Tokenizer:
        """Read a folder with tokenizer.json or spiece.model (or the path of that file). context_length and pad_token default to those
        of the folder's tokenizer_config.json, else to 512 and <pad>."""
        path = Path(path)
        folder, file = (path, path / SPIECE) if path.is_dir() else (path.parent, path)
        described = read_optional_json(path / "tokenizer.json") if path.is_dir() else {}
        published, length = cls.read_settings(folder, described, context_length)
        known = [token.content for token in (*published.listed.values(), *published.unlisted)]
        count = 0 if any(token.startswith("<extra_id_") for token in known) else published.config.get("extra_ids", GAPS)
        gaps, own = [special_token(f"<extra_id_{i}>") for i in range(count)], []
        if described:
            pieces, charsmap = _of_json(described, folder)
        elif file.is_file():
            found = read_sentencepieces(file)
            pieces, charsmap = [piece[:2] for piece in found.pieces], found.charsmap
            pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(published.config.get("extra_ids", GAPS)))]
            own = [tk.AddedToken(piece.text, normalized=False) for piece in found.pieces if piece.kind == USER_DEFINED]
        else:
            raise FileNotFoundError(f"{path} holds no T5 tokenizer: name a folder with tokenizer.json or {SPIECE}, or that file")
        tokenizer = cls(pieces, charsmap, length, pad_token or published.pad_token or PAD,
                        [*published.listed.values(), *own, *published.unlisted, *gaps])
        tokenizer.check_places(published, folder)
        return tokenizer


def _reproducible(pieces: Pieces) -> Pieces:
    """The pieces without what the trainer leaves to the order of its hash tables: the last digits of the scores, and which of the
    characters that no word needs has which score (they get the lowest, or up to 1e-4 more for each)."""
    lowest, single = min(score for _, score in pieces), sum(len(text) == 1 for text, _ in pieces)
    level = lambda text, score: lowest if len(text) == 1 and score <= lowest + 1e-4 * single else score
    return sorted(((text, round(level(text, score), 6)) for text, score in pieces), key=lambda piece: (-piece[1], piece[0]))


def _of_json(described: Mapping[str, Any], folder: Path) -> tuple[Pieces, bytes]:
    """Pieces and charsmap of tokenizer.json. Nothing else of its rules differs among T5's."""
    model, normalizer = described.get("model", {}), described.get("normalizer") or {}
    if model.get("type") != "Unigram":
        raise ValueError(f"{folder / 'tokenizer.json'} holds a {model.get('type')}, not the unigrams of T5: {INCOMPLETE}")
    steps = normalizer.get("normalizers", [normalizer])
    charsmap = next((step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"), "")
    return [(text, score) for text, score in model["vocab"]], base64.b64decode(charsmap)


def _pipeline(pieces: Pieces, charsmap: bytes) -> tk.Tokenizer:
    """Normaliser, splitter and unigrams, without special tokens."""
    unigram = tk.Tokenizer(tk.models.Unigram(pieces, unk_id=2) if pieces else tk.models.Unigram())
    if charsmap:
        unigram.normalizer = tk.normalizers.Precompiled(charsmap)
    mark = {"replacement": "▁", "prepend_scheme": "always"}
    unigram.pre_tokenizer = tk.pre_tokenizers.Sequence([tk.pre_tokenizers.WhitespaceSplit(), tk.pre_tokenizers.Metaspace(**mark)])
    unigram.decoder = tk.decoders.Metaspace(**mark)
    return unigram
