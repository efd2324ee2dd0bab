"""The bytes of encoded data that a plan states are those that lie on the disk."""

import numpy as np
import pytest
from archives import encode, noise
from caches import TOKENIZER
from preparing import VAE, run, settings

from tinyldm.config import make_config
from tinyldm.data.cache import write_tokens
from tinyldm.data.shard import HEADER
from tinyldm.planning.plan import bytes_in_cache, latent_numbers, make_plan
from tinyldm.planning.texts import caption_tokens

COUNT = 5


@pytest.mark.parametrize("changes", [{}, {"flip": True}, {"moments": True}, {"flip": True, "moments": True},
                                     {"keep_pictures": 1, "flip": True}], ids=str)
def test_a_plan_counts_the_latents_sizes_and_tokens_that_are_written(changes, tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(COUNT):
        (tmp_path / "d" / f"{i}.png").write_bytes(encode(noise(16, 16, 3)))
        (tmp_path / "d" / f"{i}.txt").write_text(f"{i}")
    config = settings(tmp_path, "d", resolution=16, **changes)
    cache = run(config, tmp_path / "cache")
    write_tokens(cache.folder, TOKENIZER)
    files = [file for kind in ("latents-*", "sizes", "pictures-*", "tokens-*") for file in (tmp_path / "cache" / "shards").rglob(f"{kind}.npy")]
    assert len(files) == 3 + ("keep_pictures" in changes) and np.load(next(file for file in files if file.name.startswith("tokens"))).itemsize == 2
    planned = bytes_in_cache(config, VAE, 16, TOKENIZER.context_length)
    assert COUNT * planned == sum(file.stat().st_size - HEADER for file in files)


def test_mirrored_pictures_take_twice_the_room_and_their_captions_do_not():
    plain, flipped = (make_plan(make_config(network="unet", unet=dict(widths=[16, 32], attention=[False, True], heads=[1, 2], groups=4),
                                            resolution=64, flip=flip)) for flip in (False, True))
    one, two = (plan.phases[-1].cache_bytes for plan in (plain, flipped))
    assert two - one == 2 * latent_numbers(plain.networks.vae, 64) + 4 * 6 and 2 * one - two == 2 * caption_tokens(plain.networks.text)
