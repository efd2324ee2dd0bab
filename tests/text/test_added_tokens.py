"""Tokens that were added to a published vocabulary: one id each, as in transformers' CLIPTokenizer, whatever files list them."""

import hashlib
import json
import random
import shutil
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from helpers import load_script, randomise
from transformers import AddedToken

from tinyldm.folders import needed
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.prompt_weights import plain, token_weights
from tinyldm.text.tokenizer import BOS, EOS, Tokenizer
from tinyldm.vendor_loaders.clip import LAYOUTS

LENGTH = 24
CONFIG = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
ADDED = [
    AddedToken("<my-dog>", normalized=True), AddedToken("<my-dog>s"), AddedToken("<my"), AddedToken("<Cat-Toy>", normalized=True),
    AddedToken("<Hat>", normalized=False), AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True, normalized=False),
    AddedToken("sks", single_word=True), AddedToken("<special>", special=True), AddedToken("two words"), AddedToken("狐")]


@cache
def plain_tokenizer() -> Tokenizer:
    return Tokenizer.train(["a photo of a red fox, my dog"] * 3, 560, LENGTH)


@cache
def prompts() -> list[str]:
    """The added tokens in every neighbourhood: at the ends, doubled, in upper case, next to letters, punctuation and white space."""
    words = [str(token) for token in ADDED]
    words += [change(word) for word in words for change in (str.upper, str.lower, lambda w: f"({w}),", lambda w: w * 2, lambda w: w + "x")]
    words += ["a", "photo", "Dog", "<", "my", "-dog>", "\u2028", "\u00a0", "\t", ",", "it's", "e\u0301", EOS, EOS.upper(), BOS, BOS.upper()]
    rng = random.Random(0)
    return words + ["".join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(rng.randint(1, 9))) for _ in range(400)]


def theirs(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return np.array(tokenizer(texts, padding="max_length", truncation=True)["input_ids"])


def differing(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """The prompts of which transformers makes other ids from the folder."""
    return [prompt for prompt, a, b in zip(prompts(), tokenizer.encode(prompts()), theirs(folder, prompts())) if (a != b).any()]


def saved_by_transformers(folder: Path, tokens: list = ADDED) -> dict[str, int]:
    """A folder that transformers 5 has written: tokenizer.json and tokenizer_config.json. Returns the added tokens and their ids."""
    base = plain_tokenizer()
    tokenizer = transformers.CLIPTokenizer(vocab=dict(base.vocab), merges=list(base.merges), model_max_length=LENGTH)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    assert not (folder / "added_tokens.json").exists() and not (folder / "vocab.json").exists()
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}


def written(folder: Path, **files: dict) -> Path:
    """A folder in the older layout: vocab.json and merges.txt, and other files."""
    plain_tokenizer().save(folder)
    for name in ("tokenizer", "special_tokens_map", "tokenizer_config"):
        (folder / f"{name}.json").unlink()
    for name, content in ({"tokenizer_config": CONFIG} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def decoder(changes: dict | None = None) -> dict[str, dict]:
    """`added_tokens_decoder` of tokenizer_config.json, as transformers 4 writes it. changes: of the flags of BOS and EOS."""
    base, names = plain_tokenizer(), ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    row = lambda token: {name: getattr(token, name) for name in names}
    own = {str(base.vocab[token]): row(AddedToken(token, special=True, normalized=False)) | (changes or {}) for token in (BOS, EOS)}
    return own | {str(len(base) + i): row(token) for i, token in enumerate(ADDED)}


def older(folder: Path, kind: str) -> Path:
    ids = {str(token): len(plain_tokenizer()) + i for i, token in enumerate(ADDED)}
    if kind == "tokenizer.json":
        saved_by_transformers(folder)
        return folder
    if kind == "added_tokens.json":
        return written(folder, added_tokens=ids, special_tokens_map=SPECIAL | {"additional_special_tokens": ["<special>"]})
    if kind == "added_tokens_decoder":
        return written(folder, tokenizer_config=CONFIG | {"added_tokens_decoder": decoder()})
    loud = {"content": BOS, "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}       # as OpenAI's files say
    return written(folder, added_tokens=ids, special_tokens_map=SPECIAL | {"bos_token": loud, "pad_token": "!"},
                   tokenizer_config=CONFIG | {"additional_special_tokens": ["<special>"]})


KINDS = ("tokenizer.json", "added_tokens.json", "added_tokens_decoder", "loud BOS")


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_lists_added_tokens_gives_the_ids_of_transformers(tmp_path, kind):
    folder = older(tmp_path, kind)
    tokenizer, n = Tokenizer.load(folder), len(plain_tokenizer())
    assert not differing(tokenizer, folder)
    assert tokenizer.encode(["a <my-dog>, <MY-DOG>s"])[0, 2:5].tolist() == [n, tokenizer.vocab[",</w>"], n + 1]
    assert len(tokenizer) == n + len(ADDED)
    assert (tokenizer.encode([BOS.upper()])[0, 1] == tokenizer.bos_token_id) == (kind == "loud BOS")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", ["", "tokenizer.json"])
def test_added_tokens_survive_saving_for_this_library_and_for_transformers(tmp_path, kind, without):
    before = Tokenizer.load(older(tmp_path / "one", kind))
    before.save(tmp_path / "two")
    assert json.loads((tmp_path / "two/added_tokens.json").read_text("utf-8"))["<my-dog>"] == len(plain_tokenizer())     # for old readers
    if without:
        (tmp_path / "two" / without).unlink()
    after = Tokenizer.load(tmp_path / "two")
    assert after.fingerprint == before.fingerprint and after.pad_token == before.pad_token
    assert (after.encode(prompts()) == before.encode(prompts())).all() and not differing(before, tmp_path / "two")


def test_only_one_of_the_lists_counts_as_in_transformers(tmp_path):
    n = len(plain_tokenizer())
    row = {"content": "<Hat>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    folder = written(tmp_path / "one", added_tokens={"<my": n}, special_tokens_map=SPECIAL | {"pad_token": "!"},
                     tokenizer_config=CONFIG | {"pad_token": EOS, "added_tokens_decoder": {str(n): row}})
    tokenizer = Tokenizer.load(folder)
    assert [token.content for token in tokenizer.added.values()] == [BOS, EOS, "<Hat>"] and tokenizer.pad_token == EOS
    assert not differing(tokenizer, folder)
    # Stable Diffusion 2's folder says EOS in tokenizer_config.json and "!" in special_tokens_map.json, which wins
    folder = written(tmp_path / "two", special_tokens_map=SPECIAL | {"pad_token": "!"}, tokenizer_config=CONFIG | {"pad_token": EOS})
    assert Tokenizer.load(folder).pad_token_id == 0 == theirs(folder, ["a"])[0, -1] and not differing(Tokenizer.load(folder), folder)


def test_special_tokens_that_are_only_named_are_added_behind_the_others(tmp_path):
    n = len(plain_tokenizer())
    folder = written(tmp_path, tokenizer_config=CONFIG | {"pad_token": "[PAD]", "additional_special_tokens": ["<special>"]},
                     added_tokens={"<my-dog>": n})
    tokenizer = Tokenizer.load(folder)
    assert [tokenizer.added[n + i].content for i in range(3)] == ["<my-dog>", "[PAD]", "<special>"]
    assert tokenizer.pad_token_id == n + 1 and not differing(tokenizer, folder)


def test_ids_with_a_gap_and_tokens_without_content_are_refused(tmp_path):
    n = len(plain_tokenizer())
    folder = written(tmp_path / "one", added_tokens={"<my-dog>": n + 2})
    assert transformers.CLIPTokenizer.from_pretrained(folder).convert_tokens_to_ids("<my-dog>") == n         # another id than was trained
    with pytest.raises(ValueError, match=rf"'<my-dog>' the id {n + 2}, but its place is {n}: .* without gaps"):
        Tokenizer.load(folder)
    for entry in ("<my-dog>", {"lstrip": True}, {"content": "<my-dog>", "lstrip": [1]}):
        with pytest.raises(ValueError, match="needs a content"):
            Tokenizer.load(written(tmp_path / "two", tokenizer_config=CONFIG | {"added_tokens_decoder": {str(n): entry}}))


# ---- several vectors, weights, what is cut off


@cache
def inverted() -> Tokenizer:
    tokens = ["<my-dog>", "<my-dog>_1", "<my-dog>_2", "<cat>", "<cat>_2", "<my"]
    return Tokenizer(plain_tokenizer().vocab, plain_tokenizer().merges, LENGTH, added=[AddedToken(token) for token in tokens])


def test_the_first_of_several_vectors_stands_for_all_as_in_diffusers(tmp_path):
    inverted().save(tmp_path)
    pipeline, tokenizer = TextualInversionLoaderMixin(), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a <my-dog>", "<my-dog>,<my-dog> and <cat>", "(<my-dog>)", "<cat>_2 <my x", "a dog", "<MY-DOG>", "<my-dog>s", "<my-dog>_1", ""]
    expected = theirs(tmp_path, [pipeline.maybe_convert_prompt(text, tokenizer) for text in texts])
    assert (inverted().encode(texts) == expected).all()
    n, dog = len(plain_tokenizer()), plain_tokenizer().vocab["dog</w>"]
    assert inverted().encode(["<my-dog> dog"])[0, 1:5].tolist() == [n, n + 1, n + 2, dog]
    assert (inverted().encode(["<my-dog> <my-dog>_1 <my-dog>_2 dog"]) == inverted().encode(["<my-dog> dog"])).all()       # written out


@pytest.mark.parametrize("prompt, words", [
    ("a (<my-dog>:1.3) dog", [1, 1.3, 1.3, 1.3, 1]), ("[<cat>] (<cat>_2:2), dog", [1 / 1.1, 2, 1, 1]),
    ("<my-dog>(_1 dog:2)", [1, 2])])
def test_all_vectors_of_an_added_token_have_the_weight_that_it_was_given(prompt, words):
    row = inverted().encode([plain(prompt)])[0].tolist()
    assert row.index(inverted().eos_token_id) == len(words) + 1
    assert token_weights(inverted(), prompt) == pytest.approx([1, *words] + [1] * (LENGTH - 1 - len(words)))


def test_white_space_that_an_added_token_takes_in_does_not_give_it_its_weight():
    tokenizer = Tokenizer(plain_tokenizer().vocab, plain_tokenizer().merges, LENGTH, added=[AddedToken("<left>", lstrip=True)])
    assert tokenizer.spans("a <left>")[2] == (1, 8)
    assert token_weights(tokenizer, "a (<left>:1.5)")[:4] == [1, 1, 1.5, 1]


def test_an_added_token_takes_one_place_of_the_row_and_is_cut_off_as_a_whole():
    one = Tokenizer(plain_tokenizer().vocab, plain_tokenizer().merges, 8, added=[AddedToken("<my-dog>")])
    assert one.cut("<my-dog> " * 6) == "" and one.cut("<my-dog> " * 7) == "<my-dog>" and one.cut("a " * 5 + "<my-dog>, a dog") == ", a dog"
    three = Tokenizer(inverted().vocab, inverted().merges, 8, added=list(inverted().added.values()))
    assert three.cut("<my-dog> a dog a") == "" and three.cut("<my-dog> a dog a photo") == "photo"
    assert three.cut("<my-dog> <my-dog> dog") == "dog"
    assert three.cut("a dog <my-dog> <my-dog> dog") == "<my-dog> dog"          # of whose vectors only one fits


def test_the_fingerprint_counts_added_tokens_and_stays_what_it_was_without_them(tmp_path):
    base = plain_tokenizer()
    plain_tokenizer().save(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    assert "added_tokens_decoder" not in json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    facts = json.dumps([sorted(base.vocab.items()), base.merges, LENGTH, EOS])          # caches on disk are named after this
    assert base.fingerprint == Tokenizer.load(tmp_path).fingerprint == hashlib.sha256(facts.encode()).hexdigest()
    loud = AddedToken(BOS, special=True, normalized=True)
    tokens = [[], [AddedToken("<a>")], [AddedToken("<b>")], [AddedToken("<a>", lstrip=True)], [loud]]
    assert len({Tokenizer(base.vocab, base.merges, LENGTH, added=added).fingerprint for added in tokens}) == len(tokens)


# ---- the text encoder


def test_ids_without_an_embedding_are_refused_in_one_line(tmp_path):
    tokenizer = inverted()
    sizes = dict(width=16, layers=1, heads=1, mlp_width=16, context_length=LENGTH)
    with torch.device("meta"):
        small, fitting = (CLIPText(CLIPTextConfig(vocab_size=len(tokenizer) - missing, **sizes)) for missing in (1, 0))
    TextEncoders([TextEncoder(fitting, tokenizer)])
    with pytest.raises(ValueError, match=rf"ids up to {len(tokenizer) - 1} \('<my'\), but .* up to {len(tokenizer) - 2}: take both from"):
        TextEncoders([TextEncoder(small, tokenizer)])


@torch.no_grad()
def test_a_caption_ends_at_its_eos_though_an_added_token_has_a_larger_id():
    ids = torch.tensor([[49406, 320, 49408, 539, 49407, 49407]])
    for eos in (2, 49407):
        with torch.device("meta"):
            tower = CLIPText(CLIPTextConfig(vocab_size=49409, width=16, layers=1, heads=1, mlp_width=16, eos_token_id=eos))
        assert tower.ends(ids).tolist() == [4]
    shapes = {"embeddings.token_embedding.weight": (49410, 64), "embeddings.position_embedding.weight": (77, 64),
              "encoder.layers.0.mlp.fc1.weight": (128, 64)}
    config = LAYOUTS["transformers"].config_of(shapes)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (49410, 49406, 49407)


def test_the_hub_is_asked_for_every_list_of_added_tokens():
    names = {f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")}
    assert names <= set(needed.of_model(names | {"model_index.json"})) and set(needed.of_tokenizer(names)) == names


@pytest.fixture(scope="module")
def textual_inversion(tmp_path_factory):
    """diffusers' pipeline, small and random, with a concept of three vectors that was learned and saved together with it."""
    folder = tmp_path_factory.mktemp("inverted")
    saved_by_transformers(folder / "words", ["<my-dog>", "<my-dog>_1", "<my-dog>_2"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words")
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(plain_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=plain_tokenizer().bos_token_id, eos_token_id=plain_tokenizer().eos_token_id))
    text.resize_token_embeddings(len(tokenizer))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=2)
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, sample_size=8,
                                  down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    for seed, module in enumerate((unet, vae, text)):
        randomise(module, seed)
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text, tokenizer=tokenizer, scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder / "model")
    return folder / "model", pipeline


@torch.no_grad()
def test_a_pipeline_with_a_learned_concept_reads_prompts_as_diffusers_does_also_after_export(tmp_path, textual_inversion):
    folder, pipeline = textual_inversion
    model = load_model(folder)
    save_model(tmp_path / "again", net=model.net, vae=model.vae, texts=list(model.text.modules.values()), tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again", safety_checker=None)
    texts = ["a photo of <my-dog>, red", "<my-dog>", "a red dog", "a " * 18 + "<my-dog> fox"]
    for text in texts:
        expected = pipeline.encode_prompt(text, "cpu", 1, False)[0]
        for found in (load_model(folder), load_model(tmp_path / "again")):
            torch.testing.assert_close(found.text.encode([text], torch.device("cpu")).context, expected)
        torch.testing.assert_close(again.encode_prompt(text, "cpu", 1, False)[0], expected)
    assert not model.text.truncated("a " * 18 + "<my-dog> fox")
    assert [found.cut for found in model.text.truncated("a " * 19 + "<my-dog> fox")] == ["fox"]


def test_sample_py_warns_of_what_is_cut_off_and_counts_an_added_token_as_its_vectors(textual_inversion, capsys):
    sample, folder = load_script("sample"), str(textual_inversion[0])
    args = sample.parse(["a " * 18 + "<my-dog> fox", "a " * 19 + "(<my-dog> fox:1.2)", "--prompt-weights", "--model", folder,
                         "--negative-prompt", "a " * 22 + "b", "--init-image", "x.png", "--invert", "a " * 22 + "c"])
    sample.open_model(args)
    assert [line.partition("left out: ")[2] for line in capsys.readouterr().err.splitlines() if line.startswith("warning")] == [
        '"fox"', '"b"', '"c"']


def test_a_tokenizer_of_another_model_is_refused_with_the_folder_s_name(tmp_path, textual_inversion):
    shutil.copytree(textual_inversion[0], tmp_path / "model")
    shutil.rmtree(tmp_path / "model/tokenizer")
    saved_by_transformers(tmp_path / "model/tokenizer", ["<my-dog>", "<my-dog>_1", "<my-dog>_2", "<hat>"])
    with pytest.raises(ValueError, match=r"model: the tokenizer has ids up to \d+ \('<hat>'\), but the text encoder"):
        load_model(tmp_path / "model")
