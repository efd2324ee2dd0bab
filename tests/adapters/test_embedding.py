"""Textual inversion: new vectors are trained alone, and drawn with as diffusers draws with them."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from helpers import PROMPT, script, small_text, thinned
from published import write_flux, write_sd3, write_sdxl
from safetensors.torch import load_file, save_file
from small_models import mmdit_model, unet_model

from tinyldm.adapters.embedding import Embeddings, apply_embeddings, grow, new_embeddings, read_embedding, save_embedding, train_tokens
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_loaded
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.pipeline import draw, draw_settings
from tinyldm.vendor_loaders import clip

DOG = "<my-dog>"
CPU = torch.device("cpu")
SIZE = dict(width=32, height=32)


def write_sd1(folder):
    save_loaded(folder, unet_model())
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def written(write, folder):
    """diffusers' pipeline, with tokenizers of its own, which the test may add tokens to."""
    return type(write(folder)).from_pretrained(folder)


def numbers(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the module that is trained


def test_only_the_new_vectors_are_trained_and_every_other_tensor_keeps_its_bits():
    model = mmdit_model()
    new = new_embeddings(model, DOG, "red", 2)
    assert [*new] == ["text", "text_2"] and all(each.vectors.shape == (2, 32) for each in new.values())
    trained, before = train_tokens(model, new), {part: copy.deepcopy(net.state_dict()) for part, net in model.modules.items()}
    begun = {part: each.vectors.detach().clone() for part, each in new.items()}
    optimizer = torch.optim.AdamW([p for each in new.values() for p in each.parameters()], lr=0.1, weight_decay=0.5)
    for _ in range(2):                                                       # the networks are not even frozen
        ids = trained.text.tokenize([f"a {DOG} on the left", PROMPT])
        cond = trained.text.encode_ids(ids, CPU)
        (cond.context.square().mean() + cond.pooled.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(net.token_embedding.weight.grad is None for net in model.text.modules.values())
    after = {part: net.state_dict() for part, net in model.modules.items()}
    for part, tensors in before.items():
        assert tensors.keys() == after[part].keys() and all(torch.equal(after[part][name], tensor) for name, tensor in tensors.items())
    assert all((each.vectors != begun[part]).all() for part, each in new.items())
    assert all([*each.state_dict()] == ["vectors"] for each in new.values())


def test_vectors_that_are_attached_compute_what_they_do_in_the_table_and_nothing_is_left_when_they_are_detached():
    model, prompts = unet_model(), [f"a {DOG} dog", f"{DOG}, {DOG}", PROMPT]
    new = new_embeddings(model, DOG, count=3)["text"]
    new.vectors.data = numbers(3, 32)
    expected = model.text.encode(prompts, CPU).context
    attached = train_tokens(model, {"text": new}).text.encode(prompts, CPU).context
    with pytest.raises(ValueError, match="attached"):
        new.attach()
    new.detach()
    assert torch.equal(model.text.encode(prompts, CPU).context, expected)
    assert torch.equal(attached[2], expected[2]) and not torch.equal(attached[0], expected[0])
    module = model.text.modules["text"]
    table = module.token_embedding.weight.detach().clone()
    grow(module, new.first, new.vectors.detach())
    assert torch.equal(module.token_embedding.weight[:-3], table) and module.config.vocab_size == len(table) + 3 == len(new.tokenizer)
    grown = train_tokens(model, {}).text.with_tokenizers({"text": new.tokenizer}).encode(prompts, CPU).context
    assert torch.equal(grown, attached)


def test_every_clip_gets_vectors_unless_other_parts_are_named(tmp_path):
    write_flux(tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert [*new_embeddings(model, DOG)] == ["text"] and [*new_embeddings(model, DOG, parts=["text_2"])] == ["text_2"]
    with pytest.raises(ValueError, match="no text encoder text_3: it has text, text_2"):
        new_embeddings(model, DOG, parts=["text_3"])


def test_vectors_begin_as_the_words_that_are_named_or_as_the_mean_of_the_table():
    tokenizer, config = small_text()
    encoder = CLIPText(config)
    table = encoder.token_embedding.weight
    row = lambda word: table[tokenizer.vocab[f"{word}</w>"]]
    begun = lambda *words: Embeddings(encoder, tokenizer, DOG, *words).vectors.detach()
    assert torch.equal(begun("red"), row("red")[None]) and torch.equal(begun(" Red ", 2), row("red").expand(2, -1))
    assert torch.equal(begun("red square", 2), torch.stack([row("red"), row("square")]))
    # spread as AUTOMATIC1111 does: vector i begins as word i * words // vectors
    assert torch.equal(begun("red square", 5), torch.stack([row(word) for word in ("red", "red", "red", "square", "square")]))
    assert torch.allclose(begun(None, 2), table.mean(0).expand(2, -1))
    half = copy.deepcopy(encoder).half()
    assert Embeddings(half, tokenizer, DOG, "red").vectors.dtype == torch.float32


@pytest.mark.parametrize("arguments, message", [
    ((DOG, "red square"), r"'red square' is 2 tokens, for 1 vector: give the token 2 vectors, or"),
    ((DOG, "red blue circle", 2), r"is 3 tokens, for 2 vectors"),
    ((DOG, " "), r"is 0 tokens.*name a word"),
    (("red", None), r"the token 'red' exists already"),
    (("Red", None), r"the token 'Red' exists already"),              # the tokenizer writes it in lower case
    (("squ", None), r"exists already"),                              # a piece of a word
    (("<|endoftext|>", None), r"exists already"),
    (("", None), r"must not be empty"),
    (("my dog ", None), r"white space"),
    ((DOG, "red", 0), r"at least 1"),
])
def test_tokens_and_words_that_cannot_work_are_refused(arguments, message):
    tokenizer, config = small_text()
    with pytest.raises(ValueError, match=message):
        Embeddings(CLIPText(config), tokenizer, *arguments)


def test_a_token_that_would_become_a_vector_of_another_one_is_refused():
    tokenizer, _ = small_text()
    two = tokenizer.with_token("<cat>", 2)
    with pytest.raises(ValueError, match="'<cat>_2' would be taken for a further vector of '<cat>'"):
        two.with_token("<cat>_2")
    with pytest.raises(ValueError, match="'<cat>_1' exists already"):
        tokenizer.with_token("<cat>_1").with_token("<cat>", 2)
    with pytest.raises(ValueError, match="'<cat>' would"):
        tokenizer.with_token("<cat>_1").with_token("<cat>")
    assert two.with_token("<cat>s").encode(["<cat>s <cat>"])[0, 1:4].tolist() == [len(two), len(two) - 2, len(two) - 1]


def test_a_tokenizer_with_a_token_keeps_all_other_ids_and_the_one_without_it_is_unchanged():
    tokenizer, _ = small_text()
    mark, texts = tokenizer.fingerprint, [PROMPT, f"a {DOG}, red", "x" * 50]
    longer = tokenizer.with_token(DOG, 2)
    assert tokenizer.fingerprint == mark != longer.fingerprint and DOG not in map(str, tokenizer.added.values())
    assert (longer.encode([PROMPT, "x" * 50]) == tokenizer.encode([PROMPT, "x" * 50])).all()
    n, red = len(tokenizer), tokenizer.vocab["red</w>"]
    assert longer.ids_of(f"red {DOG} red") == [red, n, n + 1, red] and tokenizer.ids_of("") == []
    assert longer.cut(texts[1]) == "" and (longer.pad_token, longer.context_length) == (tokenizer.pad_token, tokenizer.context_length)


# ---------------------------------------------------------------- beside diffusers


def pictures(pipeline, prompt, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    images = pipeline(prompt, num_inference_steps=3, generator=generator, output_type="np", **SIZE, **options).images
    return (images * 255).round().astype(int)


def drawn(model: Model, prompt, **how) -> np.ndarray:
    return draw(model, [prompt], [3], draw_settings(model, steps=3, **how), **SIZE).astype(int)


def assert_same(one, two):
    assert abs(one - two).max() <= 1 and one.std() > 10                      # a flat picture would prove nothing


@pytest.mark.parametrize("count", [1, 3])
def test_stable_diffusion_1_draws_with_an_embedding_of_ours_as_diffusers_does_and_with_theirs(tmp_path, count):
    pipeline, model = write_sd1(tmp_path / "model"), load_model(tmp_path / "model")
    vectors, prompt = numbers(count, 32), f"a {DOG} on the left of a {DOG}"
    without = drawn(model, prompt)
    save_embedding(tmp_path / "ours.safetensors", DOG, {"text": vectors}, model)
    assert apply_embeddings(model, [tmp_path / "ours.safetensors"]) == [DOG]
    pipeline.load_textual_inversion(tmp_path / "ours.safetensors")
    found = drawn(model, prompt)
    assert_same(found, pictures(pipeline, prompt, guidance_scale=3.0))
    assert abs(found - without).max() > 4
    theirs = load_model(tmp_path / "model")
    save_file({DOG: vectors if count > 1 else vectors[0]}, tmp_path / "theirs.safetensors")      # as textual_inversion.py saves it
    apply_embeddings(theirs, [tmp_path / "theirs.safetensors"])
    assert np.array_equal(drawn(theirs, prompt), found)


def test_sdxl_draws_with_vectors_in_both_encoders_as_diffusers_does(tmp_path):
    pipeline = written(write_sdxl, tmp_path / "model")
    model = load_model(tmp_path / "model")
    vectors = {"text": numbers(2, 64), "text_2": numbers(2, 128, seed=1)}
    save_embedding(tmp_path / "dog.safetensors", DOG, vectors, model)
    file, prompt = load_file(tmp_path / "dog.safetensors"), f"a {DOG}, red"
    assert {name: tuple(tensor.shape) for name, tensor in file.items()} == {"clip_l": (2, 64), "clip_g": (2, 128)}
    pipeline.load_textual_inversion(file["clip_l"], token=DOG, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    half = pictures(pipeline, prompt)
    pipeline.load_textual_inversion(file["clip_g"], token=DOG, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2)
    apply_embeddings(model, [tmp_path / "dog.safetensors"])
    found = drawn(model, prompt)
    assert_same(found, pictures(pipeline, prompt))
    assert abs(found - half).max() > 4                                       # each encoder counts


def test_two_files_with_one_encoder_each_are_read_for_one_token(tmp_path, capsys):
    """learned_embeds.safetensors and learned_embeds_2.safetensors, as diffusers' textual_inversion_sdxl.py writes them."""
    write_sdxl(tmp_path / "model")
    model, other = load_model(tmp_path / "model"), load_model(tmp_path / "model")
    vectors = {"text": numbers(1, 64), "text_2": numbers(1, 128, seed=1)}
    for i, (part, tensor) in enumerate(vectors.items()):
        save_file({DOG: tensor}, tmp_path / f"{i}.safetensors")
    apply_embeddings(model, [tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "0.safetensors is for the text encoder text alone: text_2 reads its token as plain text" in notes[0] and len(notes) == 2
    save_embedding(tmp_path / "both.safetensors", DOG, vectors, other)
    apply_embeddings(other, [tmp_path / "both.safetensors"])
    assert np.array_equal(drawn(model, DOG), drawn(other, DOG))


@pytest.mark.parametrize("write", [write_sd3, write_flux])
def test_models_with_t5_draw_with_an_embedding_as_diffusers_does(tmp_path, write):
    pipeline = written(write, tmp_path / "model")
    model = load_model(tmp_path / "model")
    with_ti = type("WithTextualInversion", (type(pipeline), TextualInversionLoaderMixin), {}) if write is write_sd3 else type(pipeline)
    pipeline.__class__ = with_ti
    vectors = {part: numbers(2, model.modules[part].config.width, seed=i) for i, part in enumerate(("text", "text_2"))}
    save_embedding(tmp_path / "dog.safetensors", DOG, vectors, model)
    apply_embeddings(model, [tmp_path / "dog.safetensors"])
    for i, tensor in enumerate(vectors.values()):
        number = f"_{i + 1}" if i else ""
        pipeline.load_textual_inversion(tensor, token=DOG, text_encoder=getattr(pipeline, f"text_encoder{number}"),
                                        tokenizer=getattr(pipeline, f"tokenizer{number}"))
    prompt = f"a {DOG}, red"
    plain = {"prompt_3": prompt} if write is write_sd3 else {}               # SD 3's pipeline does not write out the vectors by itself
    asked = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    assert_same(drawn(model, prompt), pictures(pipeline, asked if plain else prompt, **plain))


@pytest.mark.parametrize("write", thinned(2, [write_flux, write_sdxl]))
def test_a_model_with_a_new_token_is_saved_as_a_folder_that_stock_diffusers_opens_and_tokenises_alike(tmp_path, write):
    kind = type(write(tmp_path / "model"))
    model = load_model(tmp_path / "model")
    vectors = {part: numbers(2, module.config.width, seed=len(part)) for part, module in model.text.modules.items()}
    save_embedding(tmp_path / "dog.safetensors", DOG, vectors, model)
    apply_embeddings(model, [tmp_path / "dog.safetensors"])
    save_loaded(tmp_path / "saved", model)
    pipeline = kind.from_pretrained(tmp_path / "saved")
    prompts = [f"a {DOG}", f"({DOG})", f"a red{DOG}, {DOG} square", f"{DOG}_1", DOG.upper(), PROMPT]
    for tokenizer, theirs in zip(model.text.tokenizers, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True):
        asked = [pipeline.maybe_convert_prompt(prompt, theirs) for prompt in prompts]
        how = dict(padding="max_length", truncation=True, max_length=tokenizer.context_length)
        assert (tokenizer.encode(prompts) == np.array(theirs(asked, **how)["input_ids"])).all()
    again = load_model(tmp_path / "saved")
    assert_same(drawn(again, prompts[0]), pictures(pipeline, prompts[0]))
    assert np.array_equal(drawn(again, prompts[0]), drawn(model, prompts[0]))
    assert [words.fingerprint for words in again.text.tokenizers] == [words.fingerprint for words in model.text.tokenizers]


@pytest.mark.slow
def test_export_writes_the_model_with_the_tokens_that_it_is_given(tmp_path):
    write_sd1(tmp_path / "model")
    model = load_model(tmp_path / "model")
    save_embedding(tmp_path / "dog.safetensors", "<x>", {"text": numbers(1, 32)}, model)
    done = script("-m", "tinyldm.export", tmp_path / "model", tmp_path / "out", "--embedding", f"{tmp_path / 'dog.safetensors'}:{DOG}")
    assert done.returncode == 0, done.stderr
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    apply_embeddings(model, [f"{tmp_path / 'dog.safetensors'}:{DOG}"])
    assert_same(drawn(model, f"a {DOG}"), pictures(pipeline, f"a {DOG}", guidance_scale=3.0))


def test_old_configs_that_pool_at_the_largest_id_are_written_so_that_an_added_token_is_not_pooled_at():
    old = CLIPTextConfig(eos_token_id=2)
    assert clip.to_config(old)["eos_token_id"] == 2                          # as it was published
    assert clip.to_config(CLIPTextConfig(eos_token_id=2, vocab_size=49409))["eos_token_id"] == 49407


def test_unused_rows_of_a_table_are_taken_before_it_grows():
    tokenizer, config = small_text()
    encoder = CLIPText(CLIPTextConfig(**vars(config) | {"vocab_size": config.vocab_size + 5}))
    table, vectors = encoder.token_embedding.weight.detach().clone(), numbers(7, 32)
    grow(encoder, len(tokenizer), vectors[:2])
    assert torch.equal(encoder.token_embedding.weight, torch.cat([table[:-5], vectors[:2], table[-3:]]))
    grow(encoder, len(tokenizer), vectors)
    assert torch.equal(encoder.token_embedding.weight, torch.cat([table[:-5], vectors])) and encoder.config.vocab_size == len(table) + 2


def test_embeddings_are_cast_to_the_precision_of_the_model_and_shapes_alone_suffice(tmp_path):
    write_sd1(tmp_path / "model")
    save_embedding(tmp_path / "dog.safetensors", DOG, {"text": numbers(2, 32)}, load_model(tmp_path / "model"))
    for device, dtype in (("cpu", torch.bfloat16), ("meta", torch.float32)):
        model = load_model(tmp_path / "model", device, dtype)
        apply_embeddings(model, [tmp_path / "dog.safetensors"])
        weight = model.text.modules["text"].token_embedding.weight
        assert (weight.dtype, weight.device.type, len(weight)) == (dtype, device, len(model.text.tokenizers[0]))
    assert read_embedding(tmp_path / "dog.safetensors", load_model(tmp_path / "model")).token == DOG
