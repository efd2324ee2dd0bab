"""CLIP's tokenizer, with OpenAI's vocabulary or one trained here, and the table of all tokenizers.

Byte-level BPE with an end-of-word mark (arXiv:1508.07909; arXiv:2103.00020, Sec. 2.4). Text is normalised to NFC and lower case,
its white space is collapsed, and one regular expression splits it into words. All rules are those of transformers' CLIPTokenizer,
so a folder written by `save` opens there and gives the same ids. (OpenAI's own code also repairs mojibake with ftfy;
transformers does not, nor does this.)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

import tokenizers as tk

from tinyldm.text.base_tokenizer import BaseTokenizer, read_optional_json, write_json
from tinyldm.text.t5_tokenizer import T5Tokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"                                             # marks the last symbol of a word
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
OPENAI_FILE, OPENAI_VOCAB = "bpe_simple_vocab_16e6.txt.gz", 49408
Merges = list[tuple[str, str]]


class Tokenizer(BaseTokenizer):
    """BPE over `vocab` (symbol -> id) with `merges` in order of priority.

    pad_token: fills a row after its EOS. Stable Diffusion 1 uses EOS itself, Stable Diffusion 2 "!" (which transformers then also
    treats as a special token wherever a prompt contains it; so does this class).
    """

    published_class, ids_before, default_length = "CLIPTokenizer", 1, 77
    names = MappingProxyType({"bos_token": BOS, "eos_token": EOS, "unk_token": EOS})

    def __init__(self, vocab: dict[str, int], merges: Merges, context_length: int = 77, pad_token: str = EOS,
                 added: Sequence[tk.AddedToken] = ()):
        self.vocab, self.merges = vocab, merges
        super().__init__(_pipeline(vocab, merges), context_length, pad_token, added)
        self.bos_token_id = self._backend.token_to_id(BOS)
        self._backend.post_processor = tk.processors.RobertaProcessing(
            (EOS, self.eos_token_id), (BOS, self.bos_token_id), trim_offsets=False, add_prefix_space=False)

    def __len__(self) -> int:
        return 1 + max(*self.vocab.values(), *self.added)

    def with_added(self, added: Sequence[tk.AddedToken]) -> Tokenizer:
        return Tokenizer(self.vocab, self.merges, self.context_length, self.pad_token, added)

    def contents(self) -> list:
        return [sorted(self.vocab.items()), self.merges]

    @classmethod
    def check_size(cls, vocab_size: int) -> None:
        """ValueError for a vocabulary that is too small to be trained."""
        if vocab_size < (least := len(_symbols()) + 2):
            raise ValueError(f"vocab_size {vocab_size} is below the {least} that every text needs")

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = 77, pad_token: str = EOS) -> Tokenizer:
        """A vocabulary of at most `vocab_size` ids from captions; the same captions always give the same one.

        Ids are ordered as in CLIP: 256 byte symbols, the same 256 at the end of a word, one per merge, BOS, EOS. There are
        fewer than vocab_size where no pair of symbols is left that occurs twice: give networks len(tokenizer) embeddings.
        """
        symbols = _symbols()
        cls.check_size(vocab_size)
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
        described = read_optional_json(path / "tokenizer.json") if path.is_dir() else {}
        if described:
            vocab, merges = described["model"]["vocab"], described["model"]["merges"]
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
        elif path.is_dir() and (path / "vocab.json").exists() and (path / "merges.txt").exists():
            vocab = read_optional_json(path / "vocab.json")
            merges = _parse_merges((path / "merges.txt").read_text(encoding="utf-8"))
        elif openai.exists() and openai.suffix == ".gz":
            symbols = _symbols()
            merges = _parse_merges(gzip.decompress(openai.read_bytes()).decode())[: OPENAI_VOCAB - len(symbols) - 2]
            vocab = {symbol: i for i, symbol in enumerate([*symbols, *map("".join, merges), BOS, EOS])}
        else:
            raise FileNotFoundError(f"{path} holds no tokenizer: name a folder with tokenizer.json, or vocab.json and merges.txt, "
                                    f"or {OPENAI_FILE}")
        published, length = cls.read_settings(folder, described, context_length)
        tokenizer = cls(vocab, merges, length, pad_token or published.pad_token or EOS, [*published.listed.values(), *published.unlisted])
        tokenizer.check_places(published, folder)
        return tokenizer

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        write_json(Path(folder) / "vocab.json", dict(sorted(self.vocab.items(), key=lambda item: item[1])))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# keyed by tokenizer_class of tokenizer_config.json
TOKENIZERS: dict[str, type[BaseTokenizer]] = {"CLIPTokenizer": Tokenizer, "T5Tokenizer": T5Tokenizer}


def open_tokenizer(path: str | Path, context_length: int | None = None, pad_token: str | None = None) -> BaseTokenizer:
    """A tokenizer of the class that its folder names; where it names none that is known, T5's or CLIP's, by its files. Arguments as
    for Tokenizer.load."""
    path = Path(path)
    config = read_optional_json(path / "tokenizer_config.json") if path.is_dir() else {}
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    kind = TOKENIZERS.get(name) or (T5Tokenizer if T5Tokenizer.recognises(path) else Tokenizer)
    return kind.load(path, context_length, pad_token)


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


def _symbols() -> list[str]:
    """A printable character for each of the 256 bytes (printable bytes first), then the same 256 with the end-of-word mark."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return symbols + [symbol + END for symbol in symbols]


def _parse_merges(text: str) -> Merges:
    """The merges of merges.txt: after a header line, one pair per line in order of priority. Other lines are ignored."""
    return [(pair[0], pair[1]) for line in text.split("\n")[1:] if len(pair := line.split()) == 2]
