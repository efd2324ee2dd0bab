"""python -m benchmarks: what it computes from times, what it refuses to time, and, at a tiny scale, all of its cases."""

import json
import math
import statistics
import sys

import pytest
import torch
from helpers import script

from benchmarks import __main__ as command
from benchmarks.bench import measure, processes
from benchmarks.bench.compare import HEAD, Case, Options, Side, Turn, append, check, compare, error_of, record, rows, spread

CPU = torch.device("cpu")
DATE = {"date": "2026-01-31T12:00:00+00:00"}


class Scripted:
    """A side that says when it works, with an output and times that are given."""

    def __init__(self, name, output, times, log):
        self.name, self.found, self.times, self.log = name, output, iter(times), log

    def output(self):
        self.log.append(f"{self.name} output")
        return self.found, 9.0

    def run(self):
        self.log.append(self.name)
        return Turn(next(self.times), {"call": 0.25})

    def peak(self):
        return 1.5

    def launches(self):
        return 12


def scripted(times, outputs=None, tolerance=1e-4, exact=None, rounds=3):
    """A comparison of sides with these times, ours first; the first time is the warm-up's -> findings, what happened in which order."""
    log, names = [], [*times]
    sides = [Side(name, lambda: None, peer=name.startswith("peer"), exact=name != exact) for name in names]
    outputs = outputs or {name: torch.ones(3) for name in names}
    workers = [Scripted(name, outputs[name], times[name], log) for name in names]
    case = Case("a case", sides, lambda: 8_000_000_000_000, tolerance)
    return (lambda: compare(case, workers, rounds, lambda: 8e12)), log


def test_ratios_are_of_the_same_round_and_rates_of_the_median_time():
    run, _ = scripted({"ours": [50, 1, 2, 4], "peer": [70, 2, 2, 4], "peer compiled": [5, 1, 1, 1]})
    found = run()
    ours, peer, compiled = found.results
    assert (ours.median, peer.median, ours.seconds) == (2, 2, [1, 2, 4])
    assert ours.ratios == {"peer": (1.0, 1.0, 1.5), "peer compiled": (0.5, 0.375, 0.75)}        # of 2, 1, 1 and of 1, 0.5, 0.25
    assert compiled.ratios == {"peer": (2.0, 2.0, 3.0)} and peer.ratios == {"peer compiled": (0.5, 0.375, 0.5)}
    cells = dict(zip(HEAD, rows(found)[0]))
    assert cells["ms"] == "2,000.0" and cells["TFLOP/s"] == "4.000" and cells["of matmul"] == "50%"
    assert cells["times as fast as (quartiles)"] == "peer 1.00 (1.00 to 1.50); peer compiled 0.50 (0.38 to 0.75); call 250 ms"
    assert cells["first call s"] == "9.0" and cells["peak GB"] == "1.50" and cells["operations"] == "12"


def test_all_outputs_are_there_before_the_first_turn_and_who_is_first_alternates():
    run, log = scripted({"ours": [1] * 4, "peer": [1] * 4})
    run()
    assert log == ["ours output", "peer output", "ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 1.0, 1.001]), torch.tensor([1.0, 1.0, math.nan]), torch.ones(2)])
def test_unequal_outputs_are_refused_before_anything_is_timed(wrong):
    run, log = scripted({"ours": [1] * 4, "peer": [1] * 4}, {"ours": wrong, "peer": torch.ones(3)})
    with pytest.raises(ValueError, match=r"^a case: the output of ours differs from that of peer by .* nothing was timed"):
        run()
    assert log == ["ours output", "peer output"]


def test_the_error_of_an_approximation_is_relative_to_our_own_output_and_only_shown():
    outputs = {"ours": torch.tensor([2.0, 0.0]), "ours, fewer": torch.tensor([2.0, 1.0]), "peer": torch.tensor([2.0, 1e-5])}
    run, _ = scripted({name: [1] * 4 for name in outputs}, outputs, exact="ours, fewer")
    errors = [result.error for result in run().results]
    assert errors == [pytest.approx(5e-6, rel=1e-3), 0.5, None]


def test_an_error_is_in_units_of_the_reference_s_norm():
    assert error_of(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert math.isnan(error_of(torch.tensor([math.inf]), torch.tensor([math.inf])))
    assert check(Case("x", [Side("ours", lambda: None)], lambda: 0, 0.0), [torch.ones(1)]) == [None]


def test_the_spread_is_of_quartiles_and_one_value_has_none():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_times_are_differences_of_the_clock_and_a_product_has_two_flops_per_multiply_add(monkeypatch):
    clock = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.seconds(lambda: None, CPU) == 0.5
    assert measure.matmul_flops(CPU, torch.float32, 16) == 2 * 16**3 / 0.25


@pytest.mark.skipif(not measure.CLEAR.exists(), reason="memory is read from /proc")
def test_peak_memory_is_that_of_the_call_and_not_what_was_there_before():
    kept = torch.ones(30_000_000)
    assert measure.peak_gb(lambda: torch.ones(20_000_000).sum(), CPU) == pytest.approx(0.08, rel=0.1)
    assert len(kept) == 30_000_000


def test_an_operation_counts_once_whatever_it_calls_itself():
    x, weight = torch.ones(4, 4), torch.ones(4, 4)
    assert measure.launches(lambda: torch.nn.functional.linear(x, weight).relu() + x, CPU) == 3


def test_json_lines_are_appended_also_to_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "results" / "bench.jsonl"
    append(file, {"a": 1, "b": math.inf})
    append(file, {"a": 2})
    with open(file, "a", encoding="utf-8") as handle:
        handle.write('{"a": 3, "cut')
    append(file, {"a": "fünf"})
    lines = file.read_text(encoding="utf-8").split("\n")
    assert [json.loads(lines[i]) for i in (0, 1, 3)] == [{"a": 1, "b": None}, {"a": 2}, {"a": "fünf"}]
    assert lines[2] == '{"a": 3, "cut' and lines[4:] == [""]


def test_a_record_holds_all_times_and_what_was_derived_from_them():
    run, _ = scripted({"ours": [50, 1, 2, 4], "peer": [70, 2, 2, 4]})
    found = json.loads(json.dumps(record(run(), DATE)))
    ours = found["sides"][0]
    assert (found["date"], found["case"], found["flops"], found["matmul_tflops"]) == (DATE["date"], "a case", 8e12, 8.0)
    assert (ours["seconds"], ours["median_s"], ours["tflops"], ours["of_matmul"]) == ([1, 2, 4], 2, 4.0, 0.5)
    assert ours["times_as_fast_as"] == {"peer": {"median": 1.0, "q1": 1.0, "q3": 1.5}} and ours["notes"] == {"call": 0.25}


# ---- the cases


def options_of(name, folder="", dtype="fp32", **more):
    return Options(name, "tiny", dtype, folder=str(folder), steps=2, **more)


def every_case():
    slow = {"sample", "load", "train"}
    for name in processes.COMMANDS:
        for i, case in enumerate(processes.all_cases(options_of(name))):
            yield pytest.param(name, case.name, id=case.name, marks=[pytest.mark.slow] * (name in slow or i % 4 > 0))


def run_here(case, rounds=1):
    """The case with all sides in this process."""
    case.prepare()
    return compare(case, [side.build() for side in case.sides], rounds, lambda: measure.matmul_flops(CPU, torch.float32, 64))


@pytest.mark.parametrize("name, wanted", every_case())
def test_both_sides_of_a_case_do_the_same_work(name, wanted, tmp_path):
    (case,) = [case for case in processes.all_cases(options_of(name, tmp_path)) if case.name == wanted]
    found = run_here(case)
    ours, peer = found.results
    assert (ours.peer, peer.peer) == (False, True) and ours.error <= case.tolerance <= 2e-3
    assert ours.median > 0 and peer.launches > 0 and (found.flops > 0) == (name != "load")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "sample", "encode"])
def test_the_outputs_are_equal_in_bfloat16_too(name, tmp_path):
    for case in processes.all_cases(options_of(name, tmp_path, "bf16")):
        assert run_here(case).results[0].error <= case.tolerance


@pytest.mark.slow
def test_a_drawing_in_fewer_steps_has_an_error_that_is_not_rounding(tmp_path):
    (case,) = [case for case in processes.all_cases(options_of("sample", tmp_path, approximate=True)) if case.name.startswith("SD 1.5, a")]
    found = {result.side: result.error for result in run_here(case).results}
    assert found["tinyldm, 5 steps fewer"] > 1e-3 and {"tinyldm, --deep-cache 3", "tinyldm, --deep-cache 5"} < found.keys()


def test_useful_flops_of_a_text_encoder_by_hand():
    case = next(case for case in processes.all_cases(options_of("encode")) if case.name.startswith("CLIP"))
    batch, n, width, mlp, layers = 2, 77, 64, 128, 2
    products = 4 * 2 * n * width**2 + 2 * 2 * n**2 * width + 2 * 2 * n * width * mlp       # q, k, v, out; attention; MLP
    assert case.flops() == batch * layers * products


def test_training_counts_three_forward_passes_and_drawing_two_calls_per_step():
    from benchmarks.bench import drawing, training
    from benchmarks.bench.pairs import forward_flops
    row, case = training.ROWS[0], processes.all_cases(options_of("train"))[0]
    assert case.flops() == 3 * forward_flops(row, "tiny")
    one, two = (drawing.useful_flops(drawing.DRAWINGS[0], options_of("sample")._replace(steps=steps)) for steps in (1, 2))
    assert two - one == forward_flops(drawing.DRAWINGS[0].net, "tiny")                      # whose batch is both halves of guidance


# ---- the command


def test_a_word_that_fits_no_case_and_a_flag_that_fits_no_command_are_refused_in_one_line(monkeypatch):
    for words, message in ((["load", "--only", "foo"], "fits no case: U-Net, fp32 -> fp32; "),
                           (["load", "--compile"], "leave out --compile"),
                           (["train", "--dtype", "fp16"], "use fp32 or bf16")):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        with pytest.raises(ValueError, match=message):
            command.main()


@pytest.mark.slow
def test_the_command_prints_rows_and_appends_a_line(tmp_path):
    file = tmp_path / "bench.jsonl"
    file.write_text('{"case": "earlier"}\n', encoding="utf-8")
    (tmp_path / "room").mkdir()
    done = script("-m", "benchmarks", "encode", "--scale", "tiny", "--rounds", "2", "--only", "clip", "--dtype", "bf16", "--json", file,
                  "--folder", tmp_path / "room")
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, file.read_text(encoding="utf-8").strip().split("\n"))
    assert first == {"case": "earlier"} and second["case"] == "CLIP ViT-L text, 77 tokens, bf16"
    assert {"date", "cpu", "cores", "threads", "gpu", "memory_gb", "versions", "options"} <= second.keys() and second["versions"]["torch"]
    assert [side["side"] for side in second["sides"]] == ["tinyldm", "transformers"]
    assert f"{1e3 * statistics.median(second['sides'][0]['seconds']):,.1f}" in done.stdout
    assert not [*(tmp_path / "room").iterdir()]


@pytest.mark.slow
def test_a_fresh_case_has_a_new_process_for_every_turn_and_others_keep_theirs(tmp_path):
    options = options_of("load", tmp_path)
    case = next(case for case in processes.all_cases(options) if case.name.startswith("CLIP"))
    case.prepare()
    for fresh in (True, False):
        remote, seen = processes.Remote(case._replace(fresh=fresh), "tinyldm", options), set()
        for _ in range(2):
            assert remote.run().seconds > 0
            seen.add(remote.process.pid)
        remote.close()
        assert len(seen) == 1 + fresh


@pytest.mark.slow
def test_a_side_whose_process_fails_ends_the_command_with_one_line_of_its_own(tmp_path):
    options = options_of("load", tmp_path)
    case = next(case for case in processes.all_cases(options) if case.name.startswith("CLIP"))
    with pytest.raises(ValueError, match="^the process of tinyldm has ended with code 2; its last lines say why$"):
        processes.Remote(case, "tinyldm", options).run()        # the files were not written
