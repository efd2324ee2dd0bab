"""benchmarks/shortcuts.py compares each row with the plain picture, and counts the full calls."""

import pytest
from helpers import load_script, thinned
from small_models import unet_model
from test_text_memo import dit_model

from tinyldm.pipeline import draw_settings


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/shortcuts")


@pytest.mark.parametrize("make, name, full", thinned(2, [
    (dit_model, "--first-block-cache 0.25", None), (unet_model, "--deep-cache 3", "4/10")]))
def test_a_row_has_its_error_and_its_full_calls_and_an_exact_one_has_none(benchmark, make, name, full):
    model = make()
    rows = {row.name: row for row in benchmark.table(model, draw_settings(model, steps=10), ["a fox"], rounds=2)}
    assert rows["plain"].error == rows["keys and values in every step"].error == 0 and rows["plain"].calls == "10/10"
    assert rows["5 steps"].calls == "5/5" and rows["5 steps"].error > 0 and rows["--quantize fp8"].error > rows["--quantize int8"].error > 0
    assert full is None or rows[name].calls == full
    assert rows[name].error > 0 or rows[name].calls == "10/10"
    assert len(benchmark.render([*rows.values()]).splitlines()) == 1 + len(rows)


def test_a_shape_has_the_same_rows_without_errors(benchmark):
    rows = benchmark.shape_table(dit_model().net, steps=3, side=8, rounds=1)
    assert {"plain", "keys and values in every step", "--first-block-cache 0.1"} <= {row.name for row in rows}
    assert all(row.error != row.error for row in rows) and rows[0].calls == "3/3"
