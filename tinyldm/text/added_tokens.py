"""Tokens that were added to a published vocabulary, each of which stands for one id, such as textual inversion's `<my-dog>`.

They are listed in one of three files, by age: added_tokens.json, tokenizer.json, and tokenizer_config.json (`added_tokens_decoder`).
Which of them counts, and which flags a token has, follows transformers (PreTrainedTokenizerBase.from_pretrained, version 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers as tk

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
Json = Mapping[str, Any]


class Published(NamedTuple):
    """What a tokenizer's folder says beside its vocabulary."""

    config: Json                            # tokenizer_config.json, and special_tokens_map.json where that counts
    listed: dict[int, tk.AddedToken]        # tokens with the ids that they are listed under, by id
    unlisted: list[tk.AddedToken]           # special tokens that are only named

    @property
    def pad_token(self) -> str | None:
        found = self.config.get("pad_token")
        return _token(found, special=True).content if found else None


def read_published(config: Json, names: Json, added: Mapping[str, int], tokenizer: Json) -> Published:
    """The contents of tokenizer_config.json, special_tokens_map.json, added_tokens.json and tokenizer.json, {} for a file that a
    folder lacks -> the tokens in the order in which transformers adds them. ValueError where a token is not described."""
    extra = _extra(config)
    if "added_tokens_decoder" in config:                    # then transformers reads none of the other lists
        listed = {int(i): _token(token) for i, token in config["added_tokens_decoder"].items()}
    else:
        config = {**config, **{name: _token(token, special=True) if isinstance(token, dict) else token for name, token in names.items()}}
        special = {str(token) for token in (*_named(config), *extra)}
        listed = {i: tk.AddedToken(token, normalized=token not in special, special=token in special) for token, i in added.items()}
        listed |= {token["id"]: _token(token) for token in tokenizer.get("added_tokens", [])}
    known = {token.content for token in listed.values()}
    special = [_token(token, special=True) for token in (*_named(config), *_extra(config))]
    return Published(config, dict(sorted(listed.items())), [token for token in special if token.content not in known])


def flags(token: tk.AddedToken) -> dict[str, Any]:
    """A token as JSON writes it: its content and how it is matched."""
    return {"content": token.content} | {name: getattr(token, name) for name in FLAGS}


def _named(config: Json) -> list:
    return [config[name] for name in NAMED if config.get(name)]


def _extra(config: Json) -> list:
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(found.values()) if isinstance(found, dict) else found


def _token(described: Any, special: bool = False) -> tk.AddedToken:
    """A token from JSON: its content, or that with its flags. special: what it is where that is not said."""
    if isinstance(described, tk.AddedToken):
        return described
    if isinstance(described, str) and special:
        described = {"content": described}
    try:
        return tk.AddedToken(described["content"], **{"special": special, **{name: described[name] for name in FLAGS if name in described}})
    except (TypeError, KeyError):
        raise ValueError(f"an added token is described as {described!r}: it needs a content, and flags that are true or false") from None
