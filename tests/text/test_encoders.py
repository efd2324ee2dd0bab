"""Several text encoders under one rule: two CLIP towers of different vocabularies and widths, their features side by side."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PROMPT, randomise, small_text

from tinyldm.folders import needed
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.model import Model, architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pipeline import Morph, draw, draw_settings, PromptFeatures
from tinyldm.text import encoders
from tinyldm.text.encoders import JOINS, Join, TextEncoder, TextEncoders, TextWidths
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders.scheduler import from_config, to_config

FOX, BOAT = "a red fox on the grass", "an old boat at sea"
CPU = torch.device("cpu")


def side_by_side(answers):
    """As Stable Diffusion XL joins its two: along the features. A token counts where it is one for either."""
    mask = None if answers[0].mask is None else torch.stack([answer.mask for answer in answers]).any(0)
    return Cond(torch.cat([answer.context for answer in answers], 2), mask, torch.cat([answer.pooled for answer in answers], 1))


def one_after_the_other(answers):
    """Along the tokens, the narrower features filled up with zeros."""
    width = max(answer.context.shape[2] for answer in answers)
    wide = [torch.nn.functional.pad(answer.context, (0, width - answer.context.shape[2])) for answer in answers]
    masks = None if answers[0].mask is None else torch.cat([answer.mask for answer in answers], 1)
    return Cond(torch.cat(wide, 1), masks, answers[0].pooled)


def sums(widths):
    return TextWidths(sum(width.context for width in widths), sum(width.pooled for width in widths))


@pytest.fixture(scope="module", autouse=True)
def rules():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(JOINS, "side_by_side", Join(side_by_side, sums))
        patch.setitem(JOINS, "one_after_the_other", Join(one_after_the_other, lambda widths: TextWidths(
            max(width.context for width in widths), widths[0].pooled)))
        yield


def encoder(caption, seed, length=64, **changes):
    """A tower whose tokenizer knows the words of one caption and spells all others."""
    tokenizer = Tokenizer.train([caption] * 3, vocab_size=600, context_length=length)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config = CLIPTextConfig(vocab_size=len(tokenizer), layers=2, heads=2, mlp_width=64, context_length=length, **ids | changes)
    return TextEncoder(randomise(CLIPText(config), seed), tokenizer)


def pair(join="side_by_side", lengths=(64, 64)):
    return TextEncoders([encoder(FOX, 1, lengths[0], width=32), encoder(BOAT, 2, lengths[1], width=48, projection_dim=24)], join)


@pytest.fixture(scope="module")
def text():
    return pair()


@torch.no_grad()
def alone(encoder, captions):
    """What one encoder answers by itself."""
    return encoder.module(torch.from_numpy(encoder.tokenizer.encode(captions)))


# ---- ids and features


def test_the_ids_of_all_tokenizers_stand_side_by_side(text):
    one, two = (tokenizer.encode([FOX, BOAT]) for tokenizer in text.tokenizers)
    assert (text.tokenize([FOX, BOAT]).numpy() == np.concatenate([one, two], axis=1)).all()
    assert (one[0] != text.tokenizers[0].pad_token_id).sum() < (two[0] != text.tokenizers[1].pad_token_id).sum()      # it spells


def test_parts_are_numbered_from_the_second_on_and_change_their_mode_together(text):
    assert list(text.modules) == ["text", "text_2"] and [module.config.width for module in text.modules.values()] == [32, 48]
    text.train()
    assert all(module.training for module in text.modules.values())
    text.train(False)
    assert not any(module.training for module in text.modules.values())


@torch.no_grad()
def test_the_rule_joins_what_each_encoder_answers_alone(text):
    one, two = (alone(encoder, [FOX, BOAT, ""]) for encoder in text.encoders)
    for cond in (text.encode([FOX, BOAT, ""], CPU), text.encode_ids(text.tokenize([FOX, BOAT, ""]), CPU)):
        torch.testing.assert_close(cond.context, torch.cat([one.hidden, two.hidden], 2))
        torch.testing.assert_close(cond.pooled, torch.cat([one.pooled, two.pooled], 1))
        assert cond.mask is None
    widths = text.widths([architecture(module).widths(module.config) for module in text.modules.values()])
    assert widths == (cond.context.shape[2], cond.pooled.shape[1]) == (80, 56)


@torch.no_grad()
def test_rows_of_different_lengths_are_taken_apart_again():
    text = pair("one_after_the_other", (64, 48))
    one, two = (alone(encoder, [FOX, BOAT]) for encoder in text.encoders)
    assert text.tokenize([FOX, BOAT]).shape == (2, 112)
    cond = text.encode([FOX, BOAT], CPU)
    torch.testing.assert_close(cond.context[:, :64, :32], one.hidden)
    torch.testing.assert_close(cond.context[:, 64:], two.hidden)
    assert not cond.context[:, :64, 32:].any()


@torch.no_grad()
def test_equal_captions_are_encoded_once_by_every_encoder(text):
    seen = []
    hooks = [module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]))) for module in text.modules.values()]
    cond = text.encode_ids(text.tokenize([FOX, BOAT, FOX, FOX]), CPU)
    weighted = text.encode([FOX, BOAT, "a (red:1.3) fox on the grass", FOX], CPU, weighted=True)
    for hook in hooks:
        hook.remove()
    assert seen == [2] * 4
    apart = [text.encode([caption], CPU) for caption in (FOX, BOAT, FOX, FOX)]
    torch.testing.assert_close(cond.context, torch.cat([one.context for one in apart]))
    torch.testing.assert_close(cond.pooled, torch.cat([one.pooled for one in apart]))
    assert torch.equal(weighted.context[0], weighted.context[3]) and not torch.equal(weighted.context[0], weighted.context[2])


@torch.no_grad()
def test_many_captions_are_encoded_in_parts_with_the_same_result(text, monkeypatch):
    captions = [FOX, BOAT, "", FOX, "grass", "sea"]
    whole, seen = text.encode_ids(text.tokenize(captions), CPU), []
    monkeypatch.setattr(encoders, "CAPTIONS_AT_ONCE", 2)
    hook = text.modules["text"].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    parts = text.encode_ids(text.tokenize(captions), CPU)
    hook.remove()
    assert seen == [2, 2, 1]                                    # five different ones
    torch.testing.assert_close(parts.context, whole.context)
    torch.testing.assert_close(parts.pooled, whole.pooled)


@torch.no_grad()
def test_a_weight_acts_on_the_word_s_own_tokens_in_every_encoder(text):
    there, counts, start = FOX.index("red"), [], 0
    plain, cond = text.encode([FOX, BOAT], CPU), text.encode([FOX.replace("red", "(red:1.5)"), BOAT], CPU, weighted=True)
    for module, tokenizer in text.encoders:
        own = slice(start, start := start + module.config.width)
        weighs = torch.tensor([end > begin and there <= begin < there + 3 for begin, end in tokenizer.spans(FOX)])
        counts.append(int(weighs.sum()))
        torch.testing.assert_close(cond.context[0, weighs, own], 1.5 * plain.context[0, weighs, own])
        assert torch.equal(cond.context[0, ~weighs, own], plain.context[0, ~weighs, own])
    assert counts == [1, 3] and torch.equal(cond.context[1], plain.context[1])      # a word for one tokenizer, three letters for the other
    assert torch.equal(cond.pooled, plain.pooled)


def test_what_is_left_out_is_said_for_each_encoder():
    text = pair(lengths=(16, 16))
    one, two = text.tokenizers
    assert one.cut(FOX) == "" and text.truncated(FOX) == [("text_2", 16, two.cut(FOX))]
    long = f"{FOX} " * 4
    assert text.truncated(long) == [("text", 16, one.cut(long)), ("text_2", 16, two.cut(long))]
    assert 0 < len(one.cut(long)) < len(two.cut(long)) and text.truncated("a") == []


# ---- padding


@torch.no_grad()
def test_all_encoders_rows_are_trimmed_to_the_longest_caption_of_any_and_nothing_else_changes(text):
    ids = text.tokenize([FOX, "", BOAT])
    ends = torch.stack([module.ends(own) for (module, _), own in zip(text.encoders, ids.split(64, dim=1))])     # [2, 3]
    assert ends[0].max() < 16 < ends.max() < 32                # alone, the first would be trimmed to another length
    whole, trimmed = (text.encode_ids(ids, CPU, mask_padding=True, trim=trim) for trim in (False, True))
    assert whole.context.shape[1] == 64 and trimmed.context.shape[1] == 32
    torch.testing.assert_close(trimmed.context, whole.context[:, :32])
    torch.testing.assert_close(trimmed.pooled, whole.pooled)
    assert torch.equal(whole.mask, torch.arange(64) <= ends.amax(0)[:, None]) and torch.equal(trimmed.mask, whole.mask[:, :32])


@torch.no_grad()
def test_where_padding_is_attended_to_nothing_is_trimmed(text):
    cond = text.encode_ids(text.tokenize([FOX, BOAT]), CPU, trim=True)
    assert cond.context.shape[1] == 64 and cond.mask is None


@torch.no_grad()
def test_a_longer_row_is_trimmed_to_no_less_than_its_own_longest_caption():
    text = pair("one_after_the_other", (16, 64))
    whole, trimmed = (text.encode_ids(text.tokenize([FOX, BOAT]), CPU, mask_padding=True, trim=trim) for trim in (False, True))
    assert whole.context.shape[1] == 80 and trimmed.context.shape[1] == 48
    torch.testing.assert_close(trimmed.context, whole.context[:, :48])
    assert torch.equal(trimmed.mask, whole.mask[:, :48]) and not whole.mask[:, 48:].any()


# ---- a whole model


@pytest.fixture(scope="module")
def model(text):
    config = to_config("flow", {}, "flow", "ddim", flow_match=True)
    net = DiT(DiTConfig(width=32, layers=2, heads=2, mlp_width=64, context_dim=80, pooled_dim=56))
    vae = randomise(AutoencoderKL(VAEConfig(widths=(16, 32), depth=1, groups=8, sample_size=32)), 3)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.35                    # random pictures with little that is clipped
    defaults = {"sampler": "ddim", "steps": 4, "cfg": 3.0, "mask_padding": True, "text_join": "side_by_side"}
    return Model(randomise(net, 4), vae, text, *from_config(config), config, defaults)


@pytest.fixture
def save(model, tmp_path):
    def write(name="model", **changes):
        whole = dict(net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
                     scheduler=model.scheduler, defaults=model.defaults)
        save_model(tmp_path / name, **(whole | changes))
        return tmp_path / name
    return write


def same(module, state_dict):
    own = module.state_dict()
    return own.keys() == state_dict.keys() and all(torch.equal(own[name], state_dict[name]) for name in own)


def test_every_encoder_comes_back_bit_for_bit_with_its_tokenizer_and_the_rule(save, model):
    loaded = load_model(folder := save())
    assert list(loaded.modules) == ["net", "vae", "text", "text_2"] and loaded.text.join == "side_by_side"
    for part, module in model.modules.items():
        assert same(loaded.modules[part], module.state_dict()) and loaded.modules[part].config == module.config
        assert not loaded.modules[part].training and not any(p.requires_grad for p in loaded.modules[part].parameters())
    assert [t.fingerprint for t in loaded.text.tokenizers] == [t.fingerprint for t in model.text.tokenizers]
    assert json.loads((folder / "tinyldm.json").read_text())["text_join"] == "side_by_side"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "TinyLDMPipeline" and index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["tokenizer"] == index["tokenizer_2"] == ["transformers", "CLIPTokenizer"]


def test_the_raw_weights_of_every_encoder_lie_beside_its_averages(save, model):
    raw = {part: {name: p * 2 for name, p in model.modules[part].state_dict().items()} for part in ("net", "text", "text_2")}
    folder = save(non_ema=raw)
    averaged, loaded = load_model(folder), load_model(folder, ema=False)
    for part in raw:
        assert same(averaged.modules[part], model.modules[part].state_dict()) and same(loaded.modules[part], raw[part])
    with pytest.raises(ValueError, match="not text_3"):
        save("other", non_ema=raw | {"text_3": raw["text"]})


def test_encoders_that_were_written_before_are_linked(save, model):
    first = save("first")
    second = save("second", texts=[first / "text_encoder", first / "text_encoder_2"],
                  tokenizers=[first / "tokenizer", first / "tokenizer_2"])
    for name in ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "tokenizer_2/vocab.json"):
        assert (first / name).samefile(second / name)
    assert same(load_model(second).modules["text_2"], model.modules["text_2"].state_dict())


def test_from_the_hub_every_encoder_and_tokenizer_is_downloaded(save):
    folder = save()
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {"text_encoder_2/model.safetensors", "text_encoder_2/config.json", "tokenizer_2/vocab.json"} <= names
    assert sorted(needed.of_model(names)) == sorted(names)


@pytest.mark.parametrize("break_it, expected", [
    (lambda folder: (folder / "tinyldm.json").write_text('{"text_join": "side_by_sid"}'), "did you mean 'side_by_side'"),
    (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "no tokenizer_2/"),
    (lambda folder: (folder / "text_encoder_2" / "config.json").unlink(), "text_encoder_2/config.json does not exist")])
def test_what_is_missing_of_an_encoder_is_named(save, break_it, expected):
    break_it(folder := save())
    with pytest.raises(ValueError, match=expected) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_rule_that_is_not_known_is_refused_at_once(text):
    with pytest.raises(ValueError, match="unknown rule to join text encoders 'sideways': .*known: single, sdxl, sd3, flux, side_by_side"):
        TextEncoders(text.encoders, "sideways")


def drawn(model, prompts=(FOX,), seeds=(3,), settings=None, **options):
    return draw(model, prompts, seeds, settings or draw_settings(model), **options).astype(int)


def test_a_model_with_two_encoders_is_drawn_with_and_the_loaded_one_draws_the_same(save, model):
    loaded = load_model(save())
    images = drawn(loaded, [FOX, BOAT], [3, 4])
    assert images.shape == (2, 32, 32, 3) and images.std() > 20 and abs(images[0] - images[1]).mean() > 3
    assert (images == drawn(model, [FOX, BOAT], [3, 4])).all()
    assert all(abs(images[i] - drawn(loaded, [prompt], [seed])[0]).max() <= 1 for i, (prompt, seed) in enumerate([(FOX, 3), (BOAT, 4)]))
    settings = draw_settings(model)._replace(weighted=True)
    assert (drawn(model, settings=settings) == images[:1]).all()
    assert abs(drawn(model, ["a (red:1.5) fox on the grass"], settings=settings) - images[:1]).mean() > 0.5
    frames = drawn(model, [FOX] * 3, [3] * 3, morph=Morph(BOAT, 4, [0.0, 0.5, 1.0]))
    assert abs(frames[0] - images[0]).max() <= 1


@pytest.mark.parametrize("part", ["text", "text_2"])
def test_every_encoder_has_a_say_in_the_picture(save, model, part):
    loaded = load_model(save())
    with torch.no_grad():
        for p in loaded.modules[part].parameters():
            p.mul_(0.5)
    before, after = (PromptFeatures(one)([FOX]) for one in (model, loaded))
    changed = SimpleNamespace(context=(before.context != after.context).any((0, 1)), pooled=(before.pooled != after.pooled).any(0))
    own = slice(0, 32) if part == "text" else slice(32, None)
    assert changed.context[own].all() and changed.pooled[own].all()
    assert changed.context.sum() == changed.context[own].numel() and changed.pooled.sum() == changed.pooled[own].numel()
    assert abs(drawn(loaded) - drawn(model)).mean() > 1


def test_a_rule_says_how_each_encoder_is_called(monkeypatch):
    tokenizer, config = small_text()
    module = randomise(CLIPText(config))
    single = JOINS["single"]
    monkeypatch.setitem(JOINS, "last_but_one", Join(single.conds, single.widths, ({"skip_last": 1},)))
    text, ids = TextEncoders([TextEncoder(module, tokenizer)], "last_but_one"), torch.from_numpy(tokenizer.encode([PROMPT]))
    wanted = module(ids, skip_last=1).hidden
    assert not torch.equal(wanted, module(ids).hidden)
    for weighted in (False, True):
        assert torch.equal(text.encode([PROMPT], torch.device("cpu"), weighted=weighted).context, wanted)
