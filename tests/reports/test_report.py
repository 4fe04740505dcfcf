"""Report: numbers against references, and the text and JSON agree with them."""

import json
import math
import re

import attrs
import dp_accounting
import pytest

import dpoptax
from dpoptax import Plan, Report
from dpoptax.reports import round_up
from dpoptax.samplers import BallsInBins, FixedSize, Poisson, Shuffled, UserPoisson

# What the tests of this file share is computed by one worker.
pytestmark = pytest.mark.xdist_group("report")


def plan(**changes):
    fields = {
        "sampler": Poisson(60_000, 128),
        "clip": 2.0,
        "noise_multiplier": 1.5,
        "num_steps": 9360,
        "delta": 1 / 60_000,
    }
    return Plan(**(fields | changes))


@pytest.fixture(scope="module")
def report():
    return Report.from_plan(plan())


@pytest.mark.slow
def test_the_published_run_under_its_three_conventions(report):
    """Poisson with add-or-remove, Poisson with replace, and full batches as they were drawn."""
    assert report.epsilon == pytest.approx(0.535, abs=1e-3)
    assert report.epsilon_replace_one == pytest.approx(1.012, abs=1e-3)
    full = Report.from_plan(plan(sampler=FixedSize(60_000, 128)))
    assert full.epsilon_replace_one == pytest.approx(2.502, abs=2e-3)
    assert report.epsilon_unamplified > 16


def test_the_text_the_json_and_the_words_say_the_same(report):
    text = str(report)
    record = json.loads(report.to_json())
    assert record["epsilon"] == report.epsilon
    assert record["sampler"]["expected_batch_size"] == 128
    assert set(record["true_positive_rate"]) == {"0.001", "0.01"}
    assert len(record["epsilon_by_delta"]) == 3
    assert record["in_words"] == report.in_words()
    for part in (
        "(0.536, 1.67e-05)-differential privacy",  # rounded up
        "each single example of 60,000",
        "the data with and without this example (add_or_remove_one)",
        "FlatClip (l2_clip 2)",
        "Poisson (num_examples 60,000, expected_batch_size 128",
        "9,360 done of 9,360 planned",
        "1.012 at delta 1.67e-05 (replace_one)",
        "Without random sampling",
        "dp-accounting 0.",
        "floating-point",
        "not counted",
        "noisy gradient",
        "mu-GDP",
    ):
        assert part in text, part
    words = report.in_words()
    found = float(re.search(r"at most ([0-9.]+) of 100", words)[1])
    assert found - 0.1 < 50 + 50 * report.advantage <= found
    assert "60,000 examples" in words
    assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [FixedSize(600, 20), Shuffled(600, 20), BallsInBins(600, 30), UserPoisson(range(600), 20, 1)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_sampler_is_reported_under_its_unit_and_relation(sampler):
    text = str(Report.from_plan(plan(sampler=sampler, num_steps=30)))
    assert f"each single {sampler.unit} of 600" in text
    assert f"({sampler.relation})" in text
    assert type(sampler).__name__ in text


def test_numbers_of_privacy_are_never_rounded_down(report):
    shown = {value: round_up(value) for value in (0.535, 0.5350000005, 1.0, 0.0, math.inf)}
    assert list(shown.values()) == ["0.535", "0.536", "1.000", "0.000", "inf"]
    assert round_up(15.946, 1) == "16.0"
    for delta, text in ((1e-5, "1e-05"), (1 / 30_000, "3.34e-05"), (3e-7, "3e-07")):
        part = attrs.evolve(report, delta=delta)
        assert f", {text})-differential privacy" in str(part)
    for prior, belief in report.posterior_belief.items():
        written = re.search(rf"{100 * prior:g} % to ([0-9.]+) %", str(report))[1]
        assert 0 <= float(written) - 100 * belief < 0.1


def test_next_to_no_noise_is_reported_as_such():
    faint = Report.from_plan(plan(sampler=Shuffled(600, 20), noise_multiplier=1e-4, num_steps=1000))
    assert faint.epsilon == math.inf
    assert "no finite epsilon can be shown" in faint.in_words()
    some = plan(sampler=Shuffled(600, 20), noise_multiplier=0.1, num_steps=1000)
    assert Report.from_plan(some)


def test_a_run_without_noise_is_reported_as_no_privacy():
    bare = Report.from_plan(plan(noise_multiplier=0.0, clip=math.inf))
    assert "none (epsilon = inf)" in str(bare)
    assert "protects nobody" in bare.in_words()
    record = json.loads(bare.to_json())
    assert record["epsilon"] == record["mu"] == record["clip"]["l2_clip"] == "inf"
    assert record["advantage"] == record["true_positive_rate"]["0.001"] == 1.0


def test_a_run_without_steps_is_reported_as_free():
    nothing = Report.from_plan(plan(), 0)
    assert nothing.epsilon == nothing.epsilon_unamplified == nothing.advantage == 0
    assert nothing.posterior_belief[0.5] == 0.5


def test_the_figure_is_drawn(report, tmp_path):
    report.save_figure(tmp_path / "deep" / "report.png")
    assert (tmp_path / "deep" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_has_no_bound_under_replacement_is_reported_without_one():
    ledger = plan().ledger()
    ledger.charge(1.5, 10)
    ledger.charge_event(dp_accounting.LaplaceDpEvent(10.0))
    report = Report.from_ledger(
        ledger,
        steps_done=10,
        steps_planned=10,
        noise_multiplier=1.5,
        mechanism=dpoptax.mechanisms.Gaussian(),
    )
    assert report.epsilon_replace_one == math.inf
    assert math.isfinite(report.epsilon)
    # Ten steps were done, so random numbers were drawn.
    assert report.prng == "not stated"
    assert "inf at delta 1.67e-05 (replace_one)" in str(report)
    assert report.released.endswith("covers 1 other release on the same data")
    assert "other release" not in Report.from_plan(plan()).released


@pytest.mark.slow
def test_the_report_of_a_search_states_the_cost_of_the_whole_search():
    one_run = plan(num_steps=100)
    runs = dpoptax.accounting.RandomRuns(mean=10)
    alone, searched = Report.from_plan(one_run), Report.from_plan(one_run, runs=runs)
    event, relation = one_run.event(), one_run.sampler.relation
    expected = dpoptax.accounting.tuned(event, runs, delta=one_run.delta, relation=relation)
    assert searched.epsilon == pytest.approx(expected, rel=1e-6)
    assert searched.epsilon > alone.epsilon
    assert searched.epsilon_of_one_run == alone.epsilon
    # Every number is that of the search.
    assert searched.advantage > alone.advantage
    assert searched.mu > alone.mu
    assert searched.epsilon_replace_one > alone.epsilon_replace_one
    assert searched.epsilon_unamplified > alone.epsilon_unamplified
    for name in ("epsilon_by_group_size", "true_positive_rate", "posterior_belief"):
        for key, value in getattr(alone, name).items():
            assert getattr(searched, name)[key] > value
    text = str(searched)
    assert "the best of K runs, K random with mean 10 (geometric)" in text
    assert "drawn at random from the stated distribution" in text
    assert "Search" not in str(alone)
    assert alone.runs is None
    assert json.loads(searched.to_json())["runs"] == {
        "kind": "RandomRuns",
        "mean": 10.0,
        "shape": 1.0,
    }
