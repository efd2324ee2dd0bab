"""CLIP's tokenizer: captions in, rows of token ids out, with OpenAI's vocabulary or one trained here.

Byte-level BPE with an end-of-word mark (arXiv:1508.07909; arXiv:2103.00020, Sec. 2.4). Text is normalised to NFC and lower case,
its white space is collapsed, and one regular expression splits it into words. All rules are those of transformers' CLIPTokenizer,
so a folder written by `save` opens there and gives the same ids. (OpenAI's own code also repairs mojibake with ftfy;
transformers does not, nor does this.) Tokens that were added to a vocabulary (added_tokens.py) are found before all that, and one that
stands for several vectors is written out as diffusers' pipelines do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import tokenizers as tk

from tinyldm.text.added_tokens import flags, read_published
from tinyldm.unicode import check_unicode

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"                                             # marks the last symbol of a word
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
OPENAI_FILE, OPENAI_VOCAB = "bpe_simple_vocab_16e6.txt.gz", 49408
Merges = list[tuple[str, str]]


class Tokenizer:
    """BPE over `vocab` (symbol -> id) with `merges` in order of priority; rows are `context_length` ids long.

    pad_token: fills a row after its EOS. Stable Diffusion 1 uses EOS itself, Stable Diffusion 2 "!" (which transformers then also
    treats as a special token wherever a prompt contains it; so does this class). added: tokens that are one id wherever a caption
    contains them; those that `vocab` lacks are numbered from its end on, in this order.
    """

    def __init__(self, vocab: dict[str, int], merges: Merges, context_length: int = 77, pad_token: str = EOS,
                 added: Sequence[tk.AddedToken] = ()):
        if context_length < 3:
            raise ValueError(f"context_length {context_length} leaves no room beside BOS and EOS: use 3 or more")
        tokens = {token.content: token for token in added}
        if missing := [token for token in (BOS, EOS, pad_token) if token not in vocab and token not in tokens]:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}: is it a CLIP vocabulary?")
        self.vocab, self.merges, self.context_length, self.pad_token = vocab, merges, context_length, pad_token
        self._bpe = _pipeline(vocab, merges)
        self._bpe.add_tokens(list((tokens | {token: tokens.get(token, _special(token)) for token in (BOS, EOS, pad_token)}).values()))
        self.added = dict(sorted(self._bpe.get_added_tokens_decoder().items()))          # id -> token; BOS, EOS and pad_token too
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(self._bpe.token_to_id, (BOS, EOS, pad_token))
        self._bpe.post_processor = tk.processors.RobertaProcessing(
            (EOS, self.eos_token_id), (BOS, self.bos_token_id), trim_offsets=False, add_prefix_space=False)
        self._bpe.enable_truncation(context_length)      # truncated rows still have BOS and EOS
        self._bpe.enable_padding(length=context_length, pad_id=self.pad_token_id, pad_token=pad_token)
        contents = {token.content for token in self.added.values()}
        self._vectors = _several_vectors(contents)
        names = sorted({*contents, *self._vectors.values()}, key=len, reverse=True) if self._vectors else []
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def __len__(self) -> int:
        """The number of ids, those of added tokens included: a text encoder's vocab_size."""
        return 1 + max(*self.vocab.values(), *self.added)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that determines a caption's ids: vocabulary, merges, context length, padding, added tokens."""
        content = [sorted(self.vocab.items()), self.merges, self.context_length, self.pad_token]
        content += [self._own_tokens()] if self._own_tokens() else []           # token files in older caches are named after the rest
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _own_tokens(self) -> dict[int, dict]:
        """The added tokens in JSON, by id, but for BOS, EOS and pad_token where these are as in every tokenizer."""
        usual = [flags(_special(token)) for token in (BOS, EOS, self.pad_token)]
        return {i: found for i, token in self.added.items() if (found := flags(token)) not in usual}

    def encode(self, texts: list[str]) -> np.ndarray:
        """Captions -> int64 [b, context_length]: BOS, tokens (truncated where too long), EOS, padding. ValueError for text that is
        not Unicode."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of captions: pass [text]")
        rows = [row.ids for row in self._bpe.encode_batch_fast([self._written_out(text)[0] for text in texts])]
        return np.array(rows, dtype=np.int64).reshape(-1, self.context_length)

    def cut(self, text: str) -> str:
        """The end of `text` that `encode` cuts off; '' where all of it fits."""
        written, places = self._written_out(text)
        overflowing = self._bpe.encode(written).overflowing
        return text[places[overflowing[0].offsets[1][0]]:].strip() if overflowing else ""       # offsets[0] is that of BOS

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each position of the row, the characters [start, end) of `text` that it stands for; (0, 0) for BOS, EOS and padding."""
        written, places = self._written_out(text)
        return [(places[start], places[end - 1] + 1) if end > start else (0, 0) for start, end in self._bpe.encode(written).offsets]

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
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = 77, pad_token: str = EOS) -> Tokenizer:
        """A vocabulary of at most `vocab_size` ids from captions; the same captions always give the same one.

        Ids are ordered as in CLIP: 256 byte symbols, the same 256 at the end of a word, one per merge, BOS, EOS. There are
        fewer than vocab_size where no pair of symbols is left that occurs twice: give networks len(tokenizer) embeddings.
        """
        symbols = _symbols()
        if vocab_size < len(symbols) + 2:
            raise ValueError(f"vocab_size {vocab_size} is below the {len(symbols) + 2} that every text needs")
        # Passing all 512 symbols as special tokens fixes their ids. An initial alphabet could not contain the half
        # with </w>, whose ids would then follow the order of a hash table, and ties between merges would be broken at random.
        trainer = tk.trainers.BpeTrainer(vocab_size=vocab_size - 2, special_tokens=symbols, min_frequency=2,
                                         end_of_word_suffix=END, show_progress=False)
        bpe = _pipeline({}, [])
        bpe.train_from_iterator(captions, trainer)
        model = json.loads(bpe.to_str())["model"]
        vocab = model["vocab"] | {BOS: len(model["vocab"]), EOS: len(model["vocab"]) + 1}
        return cls(vocab, [tuple(pair) for pair in model["merges"]], context_length, pad_token)

    @classmethod
    def load(cls, path: str | Path, context_length: int | None = None, pad_token: str | None = None) -> Tokenizer:
        """Read a folder with tokenizer.json, or vocab.json and merges.txt, or OpenAI's .txt.gz (or the path of that file).

        context_length and pad_token default to those of the folder's tokenizer_config.json, else to 77 and EOS.
        """
        path = Path(path)
        folder, openai = (path, path / OPENAI_FILE) if path.is_dir() else (path.parent, path)
        described = _read_optional_json(path / "tokenizer.json") if path.is_dir() else {}
        if described:
            vocab, merges = described["model"]["vocab"], described["model"]["merges"]
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
        elif path.is_dir() and (path / "vocab.json").exists() and (path / "merges.txt").exists():
            vocab = _read_optional_json(path / "vocab.json")
            merges = _parse_merges((path / "merges.txt").read_text(encoding="utf-8"))
        elif openai.exists() and openai.suffix == ".gz":
            symbols = _symbols()
            merges = _parse_merges(gzip.decompress(openai.read_bytes()).decode())[: OPENAI_VOCAB - len(symbols) - 2]
            vocab = {symbol: i for i, symbol in enumerate([*symbols, *map("".join, merges), BOS, EOS])}
        else:
            raise FileNotFoundError(f"{path} holds no tokenizer: name a folder with tokenizer.json, or vocab.json and merges.txt, "
                                    f"or {OPENAI_FILE}")
        names = ("tokenizer_config", "special_tokens_map", "added_tokens")
        published = read_published(*(_read_optional_json(folder / f"{name}.json") for name in names), described)
        length = int(published.config.get("model_max_length") or 77)
        length = 77 if length > 1e6 else length          # transformers writes 1e30 for an unknown length
        tokenizer = cls(vocab, merges, context_length or length, pad_token or published.pad_token or EOS,
                        [*published.listed.values(), *published.unlisted])
        for i, token in published.listed.items():
            if (found := tokenizer._bpe.token_to_id(token.content)) != i:
                raise ValueError(f"{folder} gives the added token '{token.content}' the id {i}, but its place is {found}: added tokens "
                                 "are numbered from the end of the vocabulary on, without gaps")
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` and transformers' CLIPTokenizer.from_pretrained read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": self.pad_token}
        config = names | {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length}
        tokenizer = json.loads(self._bpe.to_str()) | {"truncation": None, "padding": None}      # set by the caller in transformers
        vocab = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        files = {"vocab": vocab, "tokenizer": tokenizer, "tokenizer_config": config, "special_tokens_map": names}
        if self._own_tokens():                           # tokenizer.json has them too; these are for who does not read that
            config["added_tokens_decoder"] = {str(i): flags(token) for i, token in self.added.items()}
            files["added_tokens"] = {token.content: i for i, token in self.added.items() if token.content not in self.vocab}
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


TOKENIZERS: dict[str, type[Tokenizer]] = {"CLIPTokenizer": Tokenizer}         # by tokenizer_class of tokenizer_config.json


def open_tokenizer(path: str | Path, context_length: int | None = None, pad_token: str | None = None) -> Tokenizer:
    """A tokenizer of the class that its folder names, CLIP's where it names none. Arguments as for Tokenizer.load."""
    config = _read_optional_json(Path(path) / "tokenizer_config.json") if Path(path).is_dir() else {}
    name = str(config.get("tokenizer_class", "CLIPTokenizer")).removesuffix("Fast")
    return TOKENIZERS.get(name, Tokenizer).load(path, context_length, pad_token)


def _pipeline(vocab: dict[str, int], merges: Merges) -> tk.Tokenizer:
    """Normaliser, splitter and BPE, without special tokens."""
    bpe = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=merges, unk_token=EOS, end_of_word_suffix=END))
    collapse = tk.normalizers.Replace(tk.Regex(r"\s+"), " ")
    bpe.normalizer = tk.normalizers.Sequence([tk.normalizers.NFC(), collapse, tk.normalizers.Lowercase()])
    bpe.pre_tokenizer = tk.pre_tokenizers.Sequence([
        tk.pre_tokenizers.Split(tk.Regex(WORDS), behavior="removed", invert=True),
        tk.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = tk.decoders.ByteLevel()
    return bpe


def _special(token: str) -> tk.AddedToken:
    return tk.AddedToken(token, special=True)


def _several_vectors(tokens: Collection[str]) -> dict[str, str]:
    """For tokens of several vectors, such as `<my-dog>` with `<my-dog>_1` and `<my-dog>_2`: all of them with spaces between."""
    rows = {token: [token, *takewhile(tokens.__contains__, (f"{token}_{i}" for i in count(1)))] for token in tokens}
    return {token: " ".join(row) for token, row in rows.items() if len(row) > 1}


def _symbols() -> list[str]:
    """A printable character for each of the 256 bytes (printable bytes first), then the same 256 with the end-of-word mark."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return symbols + [symbol + END for symbol in symbols]


def _parse_merges(text: str) -> Merges:
    """The merges of merges.txt: after a header line, one pair per line in order of priority. Other lines are ignored."""
    return [(pair[0], pair[1]) for line in text.split("\n")[1:] if len(pair := line.split()) == 2]


def _read_optional_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
