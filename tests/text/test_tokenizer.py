"""The tokenizer against transformers' CLIPTokenizer, id for id, on prompts chosen to be unpleasant."""

import json
import random
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tinyldm.text.tokenizer import BOS, EOS, TOKENIZERS, open_tokenizer, Tokenizer

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "clip"    # OpenAI's files, where one has them
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"no CLIP vocabulary in {REAL}")


def captions() -> list[str]:
    """Captions full of ties: many words and pairs are equally frequent."""
    rng = random.Random(0)
    words = ["red", "green", "blue", "circle", "square", "cat's", "2", "of", "a", "über", "naïve", "star!", "x-ray"]
    words += ["".join(rng.choices("abcdefg", k=rng.randint(2, 6))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(200)]


@cache
def nasty_prompts() -> list[str]:
    prompts = [
        "", " ", "\t\n ", "a", "A RED Circle", "  two   spaces  ", "tab\there", "new\nline\r\n", "it's we're I'll don't I'd",
        "'s", "''s 'S 'LL", "o'clock rock'n'roll", "1234 3.14 10,000", "½ ² ① Ⅷ ٣", "a.b,c;d:e!f?g", "!!!", "!", "! !a!b", "...",
        "(weights:1.3) [[x]] {y}", "C:\\path\\file <tag> & | ~", "100% $5 €7 £8", "naïve café", "nai\u0308ve cafe\u0301", "Å Å Å",
        "ΟΔΥΣΣΕΥΣ Σ ς", "İstanbul ıI", "STRASSE ẞ ß", "ﬁ ﬂ ﬀ", "Ǆ ǅ ǆ", "привет МИР", "你好，世界", "日本語 テスト", "한국어", "שלום עולם",
        "مرحبا بالعالم", "नमस्ते दुनिया", "ไทย", "🙂", "a🙂b 👩‍👩‍👧 🇩🇪 👍🏽", "❤️ ☺︎", "zero\u200bwidth", "nb\u00a0space\u2003em\u3000wide",
        "soft\u00adhyphen", "\u202eright to left", "bom\ufeff", "null\x00byte \x07 \x1b \x7f \x85", "\ue000 private \U0010ffff",
        "combining a\u0301\u0302\u0303\u0304", "z̸̢̛a̷l̵g̶o̵", "</w>", "a</w> b</w>", "Ġspace Ċ", "ÿÿ þ Ā ń", "x" * 300, "🙂" * 60,
        "word " * 100, "a b " * 50 + "end", "don't " * 60, "word" + "!" * 90, "é" * 200, "_under_score_ --dash-- #hash @at",
        BOS, EOS, f"a {EOS} b", f"{BOS}a{EOS}", f"x{EOS}y", "<|ENDOFTEXT|>", "<|endoftext", "< |endoftext| >", f"{EOS}{EOS}", f"  {BOS}  a",
        "I'M he'Ll they'RE we'Ve can'T she'D it'S O'S", "don’t it’s ‘quoted’ `s", "'sa 'tis '' ' 's's 're've'm'll'd",
        "a'S'Tb 'LLama rock'D", "&amp; &lt;b&gt; &#39; &nbsp; &eacute; &", "x&y;z", "\x01\x02\x03", "\x1c\x1d\x1e\x1f",
        "a\x0bb\x0cc", "\u2028line\u2029sep", "\u200b \u200c \u200d \u2060 \ufeff", "a\u200bb\u200dc",
        "\u180e\u3164\u115f", "ΑΣ ΑΣ. ΑΣα ΣΣ 'Σ Σ' ΑΣ\u0301 ΑΣ\u00adα", "Iı İi i̇ I\u0307", "ſ K Å Ω ΐ ŉ ǰ", "ﬃ ﬄ ﬅ ﬆ ﬓ",
        "éêë e\u0301e\u0302e\u0308", "ÅÅA\u030a", "각 각", "ạ̇ ạ̇", "\u0301 lone mark", "a\u0345 ᾳ ᾼ",
        "👨‍👩‍👧‍👦👩🏿‍🚀🏳️‍🌈🏴‍☠️", "👍🏻👍🏼👍🏽👍🏾👍🏿", "1️⃣ #️⃣", "🇩🇪🇫🇷🇺", "ქართული Ქართული", "Հայերեն", "አማርኛ", "বাংলা", "தமிழ்",
        "ລາວ မြန်မာ ខ្មែរ", "ᏣᎳᎩ ꭰ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 Ⓐⓑ", "一二三 〇 １２３ ＡＢＣ ａｂｃ", "カタカナ ｶﾀｶﾅ ひらがな", "العَرَبِيَّة ١٢٣ ۴۵",
        "עִבְרִית", "\u2067rtl\u2069", "𐐀𐐨 𞤀𞤢", "٪ ‰ № ™ ℠ ª º", "a!?.,;b --- === ~~~ *** ((())) <<>>", "....!!!!????",
        "$$$ 1e-5 +3.5% #1 @2 0x1F", " ".join(f"word{i} it's" for i in range(200)), " ".join(map(str, range(200))),
        "\u00a0lead", "trail\u3000", " \n both \t ", "\u2003", "\u200b", "\x00", "!" * 200, "a" + "\u0301" * 80,
    ]
    rng = random.Random(1)
    ranges = [(32, 127), (32, 127), (160, 591), (768, 880), (880, 1424), (8192, 8304), (19968, 20100), (128512, 128592)]
    for _ in range(140):
        chars = (chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 60)))
        prompts.append("".join(c + rng.choice(["", "", " "]) for c in chars))
    return prompts + anything(300)


def anything(count: int) -> list[str]:
    """Random code points, all but surrogates: half of them of any kind, half in use and thick with what rules speak of."""
    rng = random.Random(2)
    spice = ["'S", "'ll", " ", "\n", "\u200b", "\u0301", "Σ", "İ", "!", "7", "\x85", "</w>", "<|", "|>", EOS, BOS]
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    used = [c for c in every[:0x20000] if unicodedata.category(c) not in ("Cn", "Co", "Lo")]
    return ["".join(rng.choice(rng.choice([used, spice]) if i % 2 else every) for _ in range(rng.randint(1, 40)))
            for i in range(count)]


def transformers_ids(folder: Path, prompts: list[str], length: int) -> np.ndarray:
    theirs = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)
    assert theirs.model_max_length == length
    return np.array(theirs(prompts, padding="max_length", truncation=True)["input_ids"])


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(captions(), vocab_size=700, context_length=24)


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.load(REAL)


def assert_same_ids(tokenizer: Tokenizer, folder: Path) -> None:
    prompts = nasty_prompts()
    theirs = transformers_ids(folder, prompts, tokenizer.context_length)
    ours = tokenizer.encode(prompts)
    assert ours.dtype == np.int64
    wrong = [prompt for prompt, a, b in zip(prompts, ours, theirs) if (a != b).any()]
    assert not wrong


@pytest.mark.parametrize("pad_token", [EOS, "!"])
@pytest.mark.parametrize("without", ["", "tokenizer.json"])
def test_a_trained_vocabulary_opens_in_transformers_with_equal_ids(tmp_path, pad_token, without):
    tokenizer = Tokenizer.train(captions(), 700, 24, pad_token)
    tokenizer.save(tmp_path)
    if without:
        (tmp_path / without).unlink()
    assert_same_ids(tokenizer, tmp_path)


@needs_real
@pytest.mark.parametrize("pad_token", [EOS, "!"])
def test_the_published_vocabulary_gives_the_ids_of_transformers(tmp_path, real, pad_token):
    tokenizer = Tokenizer(real.vocab, real.merges, pad_token=pad_token)
    tokenizer.save(tmp_path)
    assert_same_ids(tokenizer, tmp_path)


@needs_real
def test_the_published_vocabulary_is_the_same_from_each_of_its_files(real):
    archive = Tokenizer.load(REAL / "bpe_simple_vocab_16e6.txt.gz")
    assert archive.vocab == real.vocab and archive.merges == real.merges
    assert (len(real), real.bos_token_id, real.eos_token_id, real.pad_token_id) == (49408, 49406, 49407, 49407)


@needs_real
def test_a_known_prompt_has_its_known_ids(real):
    ids = real.encode(["a photo of a cat"])[0]
    assert ids[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]


def test_ids_run_as_in_clip(trained):
    by_id = sorted(trained.vocab, key=trained.vocab.get)
    assert sorted(trained.vocab.values()) == list(range(len(trained)))
    assert by_id[0] == "!" and all(b == a + "</w>" for a, b in zip(by_id[:256], by_id[256:512]))
    assert by_id[512:-2] == ["".join(pair) for pair in trained.merges]
    assert by_id[-2:] == [BOS, EOS] and len(trained) <= 700


@pytest.mark.parametrize("without", [[], ["tokenizer.json"], ["vocab.json", "merges.txt"], ["special_tokens_map.json"]])
def test_what_is_saved_is_what_is_loaded(tmp_path, without):
    before = Tokenizer.train(captions(), 650, 24, pad_token="!")
    before.save(tmp_path)
    for name in without:
        (tmp_path / name).unlink()
    after = Tokenizer.load(tmp_path)
    assert (after.vocab, after.merges, after.context_length) == (before.vocab, before.merges, 24)
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (len(before) - 2, len(before) - 1, 0)
    assert (after.encode(nasty_prompts()) == before.encode(nasty_prompts())).all()
    assert Tokenizer.load(tmp_path, context_length=8, pad_token=EOS).encode(["a"])[0, 2:].tolist() == [len(before) - 1] * 6


def test_described_pad_tokens_and_unknown_lengths_of_published_folders_are_read(tmp_path, trained):
    trained.save(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    config = {"model_max_length": 10**30, "pad_token": {"content": "!", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.context_length == 77 and tokenizer.pad_token_id == 0


def test_the_same_captions_in_any_order_train_the_same_vocabulary(trained):
    for again in (captions(), captions()[::-1]):
        other = Tokenizer.train(again, 700, 24)
        assert other.vocab == trained.vocab and other.merges == trained.merges


def test_few_captions_give_a_smaller_vocabulary():
    assert len(Tokenizer.train(["red", "red"], 600)) == 512 + 2 + 2      # r e d</w>: two merges


def test_rows_are_bos_tokens_eos_padding(trained):
    rows = trained.encode(["red circle", "", "red " * 50])
    assert rows.shape == (3, 24) and (rows[:, 0] == trained.bos_token_id).all()
    assert rows[1, 1] == trained.eos_token_id
    red = trained.vocab["red</w>"]
    assert rows[0, 1:4].tolist() == [red, trained.vocab["circle</w>"], trained.eos_token_id]
    assert rows[2].tolist() == [trained.bos_token_id] + [red] * 22 + [trained.eos_token_id]
    assert trained.encode([]).shape == (0, 24)


def test_symbols_never_seen_in_training_do_not_turn_into_eos():
    tokenizer = Tokenizer.train(["abc abd"] * 9, 600, context_length=200, pad_token="!")
    prompts = [prompt for prompt in nasty_prompts() if EOS not in prompt]
    assert ((tokenizer.encode(prompts) == tokenizer.eos_token_id).sum(1) == 1).all()


def test_what_is_cut_off_is_the_end_of_the_prompt(trained):
    assert trained.cut("a red circle") == "" and trained.cut("red " * 22) == ""
    assert trained.cut("Red " * 22 + "CIRCLE,  blue ") == "CIRCLE,  blue"
    assert trained.cut("🙂" * 60) in "🙂" * 60 and len(trained.cut("🙂" * 60)) > 30
    for prompt in nasty_prompts():
        assert prompt.rstrip().endswith(trained.cut(prompt))


def test_errors_say_what_to_do(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match="tokenizer.json, or vocab.json and merges.txt"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="514"):
        Tokenizer.train(["a"], 300)
    with pytest.raises(ValueError, match="use 3 or more"):
        Tokenizer.train(["a"], 600, context_length=2)
    with pytest.raises(ValueError, match="is it a CLIP vocabulary"):
        Tokenizer({"a": 0}, [])
    with pytest.raises(TypeError, match="pass \\[text\\]"):
        trained.encode("a red circle")
    for call in (lambda text: trained.encode(["fine", text]), trained.cut, trained.spans):
        for text in ("caf\udce9", "\ud83d"):
            with pytest.raises(ValueError, match="is not valid UTF-8"):
                call(text)


def test_a_folder_s_tokenizer_is_of_the_class_that_it_names(tmp_path, monkeypatch):
    class Other(Tokenizer):
        pass

    monkeypatch.setitem(TOKENIZERS, "OtherTokenizer", Other)
    tokenizer = Tokenizer.train(["a red fox"] * 3, vocab_size=540, context_length=16)
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for name, kind in (("CLIPTokenizer", Tokenizer), ("OtherTokenizer", Other), ("OtherTokenizerFast", Other), ("Unknown", Tokenizer)):
        file.write_text(json.dumps(config | {"tokenizer_class": name}))
        assert type(open_tokenizer(tmp_path)) is kind
    assert (open_tokenizer(tmp_path).encode(["a fox"]) == tokenizer.encode(["a fox"])).all()
