"""T5's tokenizer against transformers' T5Tokenizer, id for id, on prompts chosen to be unpleasant, from each form of its files."""

import base64
import json
import random
import struct
import zlib
from functools import cache

import numpy as np
import pytest
from helpers import combinations
import transformers
from prompts import captions, nasty_prompts
from transformers import AddedToken

from tinyldm.text.prompt_weights import token_weights
from tinyldm.text.sentencepiece import read_sentencepieces
from tinyldm.text.t5_tokenizer import EOS, PAD, UNKNOWN, T5Tokenizer
from tinyldm.text.tokenizer import Tokenizer, open_tokenizer

LENGTH = 24
# What SentencePiece makes of the rules ﬁ -> fi, Ａ -> A, e + U+0301 -> é, Ω (U+2126) -> Ω, U+00AD -> nothing, and U+00A0, U+3000, U+200B,
# tab and line feed -> space: 1042 bytes, compressed.
CHARSMAP = zlib.decompress(base64.b85decode(
    "c-kG)dC-nk6aet^zBGfzAI&t06e3$xQ&~cVk|k22qLr)}Yp8@?OIbc!kuCInw)!lERQAYjKFYqNtW7mjsO&_)#~;7voVn+mnS1BnC-O%`$%ujlBMRLRk&4LVMLGr+"
    "jwm3{zR9O#T2o{eSj#FEF=T2w=E!ffmg$#{Op^$snPevC_K1A)n++7<7K(B!w^0l&QJfOo!Th{*vV|zko!mtk%2AdIl;>_LQkhEJ%RQ_tkdFJr2e_XqJV-UF@(|Uj"
    "Nev#R7LW1>b*Rl_)TJJeQ=cbjNCTdv5sn*;Y06VP!_z!VGg{D`=Xs8nyugdJ;$>dqRbHVrukku<Xh&N*(4J0oq%&{OCFvQTj&5RCdeEIW=}B*T@fLk}hqrl`zVxRb"
    "?=gUZ$>lPbLA=iphVlW!8AcW(7{y4&Fq#h;%Q!ybW5zR)2~1`ZpD=}KOyyIilS4K$nZayk@fmZ-<#XmSmj%h2;Y+??5exZ>#eB^YzU3R1v6K}oXI1iM_>R@AWew~2"
    "o(-&L6C2sW=A^bH6<ft^<naUB*};$OVkdjp%|7;Wfc^Z$L4M{Chxvu09N{>}_>~j<#;N(K_(S|XsSQiT@v*7+Oa5n4<0OA`nt%C+vz*~P=eWoPE^~?hxWYBA#`XWd"
    "PPFe7>vCgzZu}4LO_U4"))
GAPS = [f"<extra_id_{i}>" for i in range(100)]


@cache
def trained():
    return T5Tokenizer.train(captions(), 300, LENGTH)


def pieces():
    """A vocabulary of about 300 pieces, among them an é, an Ω, and the last ones by their score alone."""
    return [*trained().pieces, ("é", -7.25), ("Ω", -7.5), ("▁fi", -6.125), ("▁▁", -9.0)]


@cache
def prompts():
    rng = random.Random(3)
    parts = ["<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "<EXTRA_ID_0>", EOS, PAD, UNKNOWN, " ", "  ", "\n", "red", "circle", "a",
             "▁", "▁red", "ﬁ", "Ａ", "e\u0301", "\u00ad", "\u200b", "\u3000", "\u2126"]
    return nasty_prompts() + ["".join(rng.choice(parts) for _ in range(rng.randint(1, 12))) for _ in range(200)] + ["red circle " * 2000]


def number(value):
    """A protocol buffer's varint, in two bytes or one."""
    return bytes([value & 127 | 128, value >> 7]) if value > 127 else bytes([value])


def field(key, kind, content):
    """kind 2: bytes behind their length; others: the bytes as they are."""
    return number(key << 3 | kind) + (number(len(content)) if kind == 2 else b"") + content


def spiece(vocabulary, charsmap=CHARSMAP, model_type=1, kinds=()):
    """The bytes of a spiece.model, written by hand; with fields between that a reader must skip."""
    rows = []
    for i, (text, score) in enumerate(vocabulary):
        kind = dict(kinds).get(text, {PAD: 3, EOS: 3, UNKNOWN: 2}.get(text, 1))
        row = field(1, 2, text.encode()) + (field(2, 5, struct.pack("<f", score)) if score else b"")
        rows.append(field(1, 2, row + (field(3, 0, number(kind)) if kind != 1 or i % 2 else b"")))      # 1 need not be said
    trainer = field(1, 2, b"corpus.txt") + field(3, 0, number(model_type)) + field(10, 5, struct.pack("<f", 0.9995))
    trainer += field(40, 0, number(2))
    normalizer = field(1, 2, b"nmt_nfkc") + field(2, 2, charsmap) + field(3, 0, number(1))
    return b"".join(rows) + field(2, 2, trainer) + field(3, 2, normalizer) + field(99, 1, bytes(8))


def theirs_from(vocabulary, **options):
    return transformers.T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=CHARSMAP, **options)


def wrong(tokenizer, theirs, length=LENGTH):
    """The prompts of which transformers makes other ids."""
    other = np.array(theirs(prompts(), padding="max_length", truncation=True, max_length=length)["input_ids"])
    ours = tokenizer.encode(prompts())
    assert ours.dtype == np.int64 and ours.shape == other.shape
    return [prompt for prompt, a, b in zip(prompts(), ours, other) if (a != b).any()]


def test_a_vocabulary_trained_here_opens_in_transformers_with_equal_ids(tmp_path):
    trained().save(tmp_path)
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == LENGTH and not wrong(trained(), theirs)
    assert not wrong(trained(), transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_spiece_model_alone_gives_the_ids_of_transformers(tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece(pieces()))
    found = read_sentencepieces(tmp_path / "spiece.model")
    assert [piece.text for piece in found.pieces] == [text for text, _ in pieces()] and found.unknown_id == 2 and found.charsmap == CHARSMAP
    scores = [struct.unpack("<f", struct.pack("<f", score))[0] for _, score in pieces()]
    assert [piece.score for piece in found.pieces] == scores and [piece.kind for piece in found.pieces[:4]] == [3, 3, 2, 1]
    theirs = theirs_from([*zip([text for text, _ in pieces()], scores), *((gap, 0.0) for gap in reversed(GAPS))])
    for source in (tmp_path, tmp_path / "spiece.model"):
        tokenizer = open_tokenizer(source, LENGTH)
        assert isinstance(tokenizer, T5Tokenizer) and not wrong(tokenizer, theirs)
    n = len(pieces())
    assert len(tokenizer) == n + 100
    assert tokenizer.encode(["<extra_id_0> <extra_id_99>"])[0, :3].tolist() == [n + 99, n, 1]
    assert open_tokenizer(tmp_path).context_length == 512 and tokenizer.pad_token_id == 0


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
CONFIGS = {
    "usual": {"additional_special_tokens": GAPS, "extra_ids": 100, "model_max_length": LENGTH},
    "nothing said": {},
    "no gaps": {"extra_ids": 0},
    "described": {"added_tokens_decoder": {str(i): FLAGS | {"content": text} for i, text in enumerate((PAD, EOS, UNKNOWN))}},
    "gaps that take in white space": {"additional_special_tokens": GAPS, "added_tokens_decoder": {
        str(len(pieces()) + 99 - i): FLAGS | {"content": gap, "lstrip": True, "rstrip": i % 2 == 0} for i, gap in enumerate(GAPS)}},
}


@pytest.mark.parametrize("form, name", combinations(2, ["alone", "in a sequence"], CONFIGS))
def test_tokenizer_json_in_each_published_form_gives_the_ids_of_transformers(tmp_path, form, name):
    config = CONFIGS[name]
    whole = theirs_from([*pieces(), *((gap, 0.0) for gap in reversed(GAPS))])
    whole.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    described = json.loads(file.read_text())
    if form == "in a sequence":                         # as transformers 4.40 and later convert it
        described["normalizer"] = {"type": "Sequence", "normalizers": [described["normalizer"], {
            "type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]}
    file.write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"} | config))
    tokenizer, theirs = open_tokenizer(tmp_path, LENGTH), transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert not wrong(tokenizer, theirs)
    tokenizer.save(tmp_path / "again")
    again = open_tokenizer(tmp_path / "again")
    assert again.fingerprint == tokenizer.fingerprint and again.context_length == LENGTH and not wrong(again, theirs)
    assert not wrong(again, transformers.T5Tokenizer.from_pretrained(tmp_path / "again"))


def test_tokens_that_were_added_keep_their_ids(tmp_path):
    theirs = theirs_from([*pieces(), *((gap, 0.0) for gap in reversed(GAPS))])
    theirs.add_tokens([AddedToken("<my-dog>"), AddedToken("sks", single_word=True)])
    theirs.save_pretrained(tmp_path)
    tokenizer, n = open_tokenizer(tmp_path, LENGTH), len(pieces()) + 100
    texts = ["a <my-dog>, sks", "<my-dog>s asks sks"]
    expected = np.array(theirs(texts, padding="max_length", max_length=LENGTH)["input_ids"])
    assert (tokenizer.encode(texts) == expected).all() and len(tokenizer) == n + 2
    assert n in tokenizer.encode(texts)[0] and n + 1 in tokenizer.encode(texts)[0]


def test_a_piece_that_its_maker_defined_is_one_id_inside_a_word_too(tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece([*pieces(), ("<nl>", 0.0)], kinds=[("<nl>", 4)]))
    assert len(pieces()) in open_tokenizer(tmp_path, LENGTH).encode(["red<nl>fox"])[0]


def test_a_row_that_is_cut_still_ends_and_the_end_of_the_caption_is_told(tmp_path):
    a = len(trained().pieces)
    tokenizer = T5Tokenizer([*trained().pieces, ("▁a", -0.5), ("▁of", -0.5)], context_length=LENGTH)
    rows = tokenizer.encode(["a of", "", "a " * 100])
    assert rows[0, 0] == a and rows[0, 2] == tokenizer.eos_token_id == 1 and (rows[0, 3:] == 0).all()
    assert rows[1].tolist() == [1] + [0] * (LENGTH - 1) and rows[2].tolist() == [a] * (LENGTH - 1) + [1]
    assert tokenizer.cut("a " * 23) == "" and tokenizer.cut("a " * 23 + "circle  blue ") == "circle  blue"
    for prompt in prompts():
        assert prompt.rstrip().endswith(tokenizer.cut(prompt))
    assert token_weights(tokenizer, "a (of:1.5) [a]")[:4] == [1.0, 1.5, pytest.approx(1 / 1.1), 1.0]


def test_the_same_captions_in_any_order_train_the_same_vocabulary_and_ascii_is_in_it():
    for again in (captions(), captions()[::-1]):
        assert T5Tokenizer.train(again, 300, LENGTH).pieces == trained().pieces
    known = {text for text, _ in trained().pieces}
    assert len(trained()) <= 300 and {chr(code) for code in range(33, 127)} | {"ü", "ï"} <= known
    assert UNKNOWN not in trained()._backend.encode("Sphinx of black quartz, judge my vow! {~}").tokens
    assert [text for text, _ in trained().pieces[:3]] == [PAD, EOS, UNKNOWN]


def test_every_setting_that_changes_ids_changes_the_fingerprint():
    tokenizers = [T5Tokenizer(pieces()), T5Tokenizer(pieces()[:-1]), T5Tokenizer(pieces(), CHARSMAP),
                  T5Tokenizer(pieces(), context_length=9), T5Tokenizer(pieces(), added=[AddedToken("<x>")]),
                  T5Tokenizer([*pieces()[:-1], ("▁▁", -9.5)])]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    assert T5Tokenizer(pieces()).fingerprint == tokenizers[0].fingerprint


def test_a_folder_that_names_no_class_is_told_by_its_files(tmp_path):
    for folder, tokenizer in ((tmp_path / "t5", trained()), (tmp_path / "clip", Tokenizer.train(["a red fox"] * 3, 540, 16))):
        tokenizer.save(folder)
        (folder / "tokenizer_config.json").unlink()
        assert type(open_tokenizer(folder)) is type(tokenizer)


def test_errors_say_what_to_do(tmp_path):
    file = tmp_path / "spiece.model"
    whole = spiece(pieces())
    for content, reason in (
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"", "holds no pieces"), (whole[:1000], "damaged"),
            (whole[:-300], "damaged"), (b"{}", "damaged"), (spiece(pieces(), model_type=2), "no vocabulary of unigrams"),
            (spiece([("<unk>", 0.0), *pieces()]), "does not begin with <pad>, </s>, <unk>: is it a T5 vocabulary")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as error:
            T5Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json or spiece.model"):
        T5Tokenizer.load(tmp_path)
    Tokenizer.train(["a red fox"] * 3, 540, 16).save(tmp_path)
    with pytest.raises(ValueError, match="holds a BPE, not the unigrams of T5"):
        T5Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="below the 98"):
        T5Tokenizer.train(["a"], 90)
    with pytest.raises(ValueError, match="use 2 or more"):
        T5Tokenizer(pieces(), context_length=1)
    with pytest.raises(ValueError, match="is not valid UTF-8"):
        trained().encode(["caf\udce9"])
