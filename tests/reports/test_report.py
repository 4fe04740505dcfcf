"""The report: numbers against references, words and JSON that agree with them."""

import dataclasses
import json
import math
import re

import dp_accounting
import numpy as np
import pytest
import scipy.stats

import dpoptax
from dpoptax import Plan
from dpoptax.__main__ import main
from dpoptax.accounting import event_privacy_loss, noise_beside_quantile, poisson_event, trade_off
from dpoptax.reports._report import of_run, round_up
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
    return plan().report()


@pytest.mark.parametrize(
    ("noise", "advantage", "rates"),
    [
        (1.1, 0.09296, {1e-6: 3.236e-6, 1e-4: 2.524e-4, 1e-3: 0.0021807, 0.1: 0.14784}),
        (0.7, 0.20482, {1e-5: 1.34e-4, 1e-3: 0.005966, 1e-2: 0.03839, 0.1: 0.227891}),
        (0.517, 0.41621, {1e-5: 0.0026169, 1e-3: 0.038987, 1e-2: 0.13988, 0.1: 0.44763}),
    ],
)  # fmt: skip
def test_what_an_attacker_can_do_against_reference_values(noise, advantage, rates):
    loss = plan(noise_multiplier=noise, num_steps=9380, delta=1e-5).privacy_loss()
    assert trade_off.advantage(loss) == pytest.approx(advantage, rel=5e-3)
    found = trade_off.true_positive_rates(loss, list(rates))
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-2)


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_the_trade_off_curve_of_a_gaussian_is_the_analytic_one(mu):
    loss = event_privacy_loss(dp_accounting.GaussianDpEvent(1 / mu), delta=1e-8)
    rates = np.geomspace(1e-5, 0.9, 30)
    exact = scipy.stats.norm.cdf(scipy.stats.norm.ppf(rates) + mu)
    found = trade_off.true_positive_rates(loss, rates)
    assert np.all(found >= exact * (1 - 1e-9))
    np.testing.assert_allclose(found, exact, rtol=2e-3)
    assert trade_off.dominating_mu(loss) == pytest.approx(mu, rel=2e-3)
    assert trade_off.advantage(loss) == pytest.approx(
        2 * scipy.stats.norm.cdf(mu / 2) - 1, rel=1e-3
    )


def test_beliefs_are_odds_times_exp_epsilon():
    assert trade_off.posterior_belief(math.log(3), 0.5) == pytest.approx(0.75)
    assert trade_off.posterior_belief(math.log(9), 0.1) == pytest.approx(0.5)
    assert trade_off.posterior_belief(math.inf, 0.01) == 1.0


def test_the_published_run_under_its_three_conventions(report):
    """Of one run: Poisson add-or-remove, Poisson replace, and full batches as they were drawn."""
    assert report.epsilon == pytest.approx(0.535, abs=1e-3)
    assert report.epsilon_replaced == pytest.approx(1.012, abs=1e-3)
    full = plan(sampler=FixedSize(60_000, 128)).report()
    assert full.epsilon_replaced == pytest.approx(2.502, abs=2e-3)
    assert report.epsilon_unamplified > 16


def test_the_text_the_json_and_the_words_say_the_same(report):
    text = str(report)
    record = json.loads(report.to_json())
    assert record["epsilon"] == report.epsilon
    assert record["sampler"]["expected_batch_size"] == 128
    assert set(record["true_positive_rate"]) == {"0.001", "0.01"}
    assert len(record["epsilon_at"]) == 3
    assert record["in_words"] == report.in_words()
    for part in (
        "(0.536, 1.67e-05)-differential privacy",  # rounded up
        "one example of 60000, add_or_remove_one",
        "l2_clip 2",
        "Poisson, num_examples 60000, expected_batch_size 128",
        "9360 done of 9360 planned",
        "under replace_one",
        "without amplification",
        "dp-accounting 0.",
        "floating-point",
        "not counted",
        "noisy gradient",
        "mu-GDP",
    ):
        assert part in text, part
    words = report.in_words()
    found = float(re.search(r"at most ([0-9.]+) times in 100", words)[1])
    assert found - 0.1 < 50 + 50 * report.advantage <= found
    assert "60,000 examples" in words
    assert all(len(line) <= 130 for line in text.splitlines())


@pytest.mark.parametrize(
    "sampler",
    [FixedSize(600, 20), Shuffled(600, 20), BallsInBins(600, 30), UserPoisson(range(600), 20, 1)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_sampler_is_reported_under_its_unit_and_relation(sampler):
    text = str(plan(sampler=sampler, num_steps=30).report())
    assert f"one {sampler.unit} of 600, {sampler.relation}" in text
    assert type(sampler).__name__ in text


def test_numbers_of_privacy_are_never_rounded_down(report):
    shown = {value: round_up(value) for value in (0.535, 0.5350000005, 1.0, 0.0, math.inf)}
    assert list(shown.values()) == ["0.535", "0.536", "1.000", "0.000", "inf"]
    assert round_up(15.946, 1) == "16.0"
    for delta, text in ((1e-5, "1e-05"), (1 / 30_000, "3.34e-05"), (3e-7, "3e-07")):
        part = dataclasses.replace(report, delta=delta)
        assert f", {text})-differential privacy" in str(part)
    for prior, belief in report.belief.items():
        written = re.search(rf"{100 * prior:g} % to ([0-9.]+) %", str(report))[1]
        assert 0 <= float(written) - 100 * belief < 0.1


def test_next_to_no_noise_is_reported_as_such():
    faint = plan(sampler=Shuffled(600, 20), noise_multiplier=1e-4, num_steps=1000).report()
    assert faint.epsilon == math.inf
    assert "no finite epsilon can be shown" in faint.in_words()
    assert plan(sampler=Shuffled(600, 20), noise_multiplier=0.1, num_steps=1000).report()


def test_a_run_without_noise_is_reported_as_no_privacy():
    bare = plan(noise_multiplier=0.0, clip=math.inf).report()
    assert "none: epsilon = inf" in str(bare)
    assert "protects nobody" in bare.in_words()
    record = json.loads(bare.to_json())
    assert record["epsilon"] == record["mu"] == record["clip"]["l2_clip"] == "inf"
    assert record["advantage"] == record["true_positive_rate"]["0.001"] == 1.0


def test_a_run_without_steps_is_reported_as_free():
    nothing = plan().report(0)
    assert nothing.epsilon == nothing.epsilon_unamplified == nothing.advantage == 0
    assert nothing.belief[0.5] == 0.5


def test_the_picture_is_drawn(report, tmp_path):
    report.save_picture(tmp_path / "deep" / "report.png")
    assert (tmp_path / "deep" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_plans_survive_json():
    for made in (
        plan(),
        plan(clip=math.inf, noise_multiplier=0),
        plan(sampler=dpoptax.samplers.CyclicPoisson(600, 20, 3)),
        plan(noise_multiplier=dpoptax.schedules.Schedule((1.1, 0.1 + 0.2), (5, 9))),
    ):
        assert Plan.from_json(made.to_json()) == made
    with pytest.raises(TypeError, match="UserPoisson has no record"):
        plan(sampler=UserPoisson(range(600), 20, 1)).to_json()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.pop("delta"), r"lacks \['delta'\]"),
        (lambda r: r.update(seed=0), r"has \['seed'\] too many"),
        (lambda r: r.update(format="other"), "expected a record of format"),
        (lambda r: r["sampler"].update(kind="Bernoulli"), "unknown sampler 'Bernoulli'"),
        (lambda r: r["sampler"].update(shuffle=True), r"has \['shuffle'\] too many"),
        (lambda r: r["clip"].update(kind="adaptive"), "unknown clip"),
        (lambda r: r.update(sampler="Poisson"), "a sampler is a JSON object"),
        (lambda r: r.update(delta=2.0), "delta must lie strictly between"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(change, match):
    record = json.loads(plan().to_json())
    change(record)
    with pytest.raises(ValueError, match=match):
        Plan.from_json(json.dumps(record))


def test_the_numbers_of_other_libraries():
    event = poisson_event(noise_multiplier=1.5, sampling_rate=128 / 60_000, num_steps=9360)
    exact = dpoptax.accounting.event_epsilon(event, delta=1 / 60_000)
    assert exact == pytest.approx(plan().epsilon(), rel=1e-3)
    ends = {"noise_multiplier": 1.0, "num_steps": np.int32(3)}
    for rate, bound in ((0.0, 0.0), (1.0, 11.0)):
        event = poisson_event(sampling_rate=rate, **ends)
        assert dpoptax.accounting.event_epsilon(event, delta=1e-5) <= bound
    with pytest.raises(ValueError, match=r"sampling_rate is a probability; got 128"):
        poisson_event(sampling_rate=128, **ends)


def test_what_has_no_bound_under_replacement_is_reported_without_one():
    ledger = plan().ledger()
    ledger.charge(1.5, 10)
    ledger.charge_event(dp_accounting.LaplaceDpEvent(10.0))
    told = of_run(plan(), ledger, 10)
    assert told.epsilon_replaced == math.inf
    assert math.isfinite(told.epsilon)
    assert "under replace_one" in str(told)


def test_a_quantile_released_beside_takes_its_share():
    noise = noise_beside_quantile(1.0, 5.0)
    # One example moves the pair (gradient / noise, count / 5) by the norm of (1 / noise, 1 / 10).
    assert math.hypot(1 / noise, 0.5 / 5.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="must exceed half of noise_multiplier"):
        noise_beside_quantile(1.0, 0.5)


def test_the_command_line_reports(tmp_path, capsys):
    path = tmp_path / "plan.json"
    path.write_text(plan(num_steps=100).to_json())
    assert main(["report", str(path), "--steps", "10", "--picture", str(tmp_path / "a.png")]) == 0
    assert "10 done of 100 planned" in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()
    assert main(["report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_done"] == 100
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--batch-size", "20", "--epochs", "10"], "noise_multiplier"),
        (["--batch-size", "20", "--noise-multiplier", "2"], "num_steps"),
        (["--noise-multiplier", "2", "--steps", "100"], "batch_size"),
    ],
)
def test_the_command_line_finds_what_is_not_given(given, name, tmp_path, capsys):
    path = tmp_path / "plan.json"
    budget = ["--num-examples", "1000", "--epsilon", "2", "--delta", "1e-5", "--out", str(path)]
    assert main(["calibrate", *budget, *given]) == 0
    assert capsys.readouterr().out.startswith(f"{name} ")
    assert 1.9 < Plan.from_json(path.read_text()).epsilon() <= 2.0
    assert main(["calibrate", *budget, *given[:2]]) == 2
    assert "the one that is left out is found" in capsys.readouterr().err
