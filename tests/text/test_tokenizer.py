"""The tokenizer against transformers' CLIPTokenizer, id for id, on prompts chosen to be unpleasant."""

import json
from pathlib import Path

import numpy as np
import pytest
from prompts import captions, nasty_prompts

from tinyldm.text.tokenizer import BOS, EOS, TOKENIZERS, Tokenizer, open_tokenizer

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "clip"    # OpenAI's files, where one has them
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"no CLIP vocabulary in {REAL}")


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
