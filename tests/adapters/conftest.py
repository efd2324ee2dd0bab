"""Small models of all families, as diffusers writes them."""

import pytest


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function: family -> (its folder, diffusers' pipeline), written the first time."""
    from published import PIPELINES
    memo = {}

    def written(name):
        if name not in memo:
            folder = tmp_path_factory.mktemp(name)
            memo[name] = folder, PIPELINES[name](folder)
        return memo[name]
    return written
