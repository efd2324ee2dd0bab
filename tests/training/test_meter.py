"""What is measured while training: means per line, per bin of t, and steps that are left out."""

import pytest
import torch

from tinyldm.training.meter import BINS, TOO_MANY, Meter


def test_a_line_holds_the_means_of_its_steps():
    meter = Meter(torch.device("cpu"))
    for step, norm in ((1.0, 2.0), (3.0, 6.0)):
        for _ in range(2):                                                      # two micro-batches of two
            meter.add(torch.tensor([step, step + 1]), 1 / 4, torch.tensor([0.0, 0.99]))
        meter.keep(norm)
    row = meter.row()
    assert row["loss"] == pytest.approx(2.5) and row["grad_norm"] == pytest.approx(4.0) and "skipped" not in row
    assert row["t_bins"] == [2.0, *[None] * (BINS - 2), 3.0]
    assert meter.row() == {"loss": None}                                        # nothing since


def test_t_at_either_end_has_a_bin():
    meter = Meter(torch.device("cpu"))
    meter.add(torch.arange(3.0), 1 / 3, torch.tensor([0.0, 0.5, 1.0]))
    meter.keep(1.0)
    assert meter.row()["t_bins"] == [0.0, None, None, None, 1.0, None, None, 2.0]


def test_a_step_that_is_left_out_leaves_no_trace_in_the_means():
    meter = Meter(torch.device("cpu"))
    meter.add(torch.ones(2), 0.5, torch.rand(2))
    meter.keep(1.0)
    meter.add(torch.full((2,), float("nan")), 0.5, torch.rand(2))
    assert "seed 7, batch 3" in meter.count_skipped(3, 7).replace("--", "")
    assert meter.row()["loss"] == 1.0 and meter.skipped == 1 and meter.row()["skipped"] == 1


def test_ten_in_a_row_stop_the_run_and_one_good_step_forgives_the_rest():
    meter = Meter(torch.device("cpu"))
    for _ in range(TOO_MANY - 1):
        meter.count_skipped(5, 0)
    meter.keep(1.0)
    for _ in range(TOO_MANY - 1):
        meter.count_skipped(5, 0)
    with pytest.raises(ValueError, match="10 updates in a row, up to batch 5 .seed 0.*--resume yes"):
        meter.count_skipped(5, 0)


def test_the_sums_survive_a_checkpoint():
    one = Meter(torch.device("cpu"))
    one.add(torch.rand(4), 0.25, torch.rand(4))
    one.keep(0.3)
    one.count_skipped(1, 0)
    two = Meter(torch.device("cpu"))
    two.load(one.state())
    assert two.state() == one.state() and two.row() == one.row()
