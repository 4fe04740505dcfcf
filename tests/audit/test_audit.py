"""An audit as a value: its bounds, its text, its file, its figure, and its place in a report."""

import json

import numpy as np
import pytest

import dpoptax
from dpoptax import Plan, Report
from dpoptax.__main__ import main
from dpoptax._attacks._curves import GaussianCurve
from dpoptax.accounting import trade_off
from dpoptax.audit import Audit
from dpoptax.reports._attack import attack_in_words
from dpoptax.samplers import Poisson

PLAN = Plan(sampler=Poisson(1000, 1000), clip=1.0, noise_multiplier=5.0, num_steps=20, delta=1e-4)
MU = trade_off.dominating_mu(PLAN.privacy_loss())


def scores(mu, num_canaries=1000, seed=2):
    rng = np.random.default_rng(seed)
    is_in = rng.random(num_canaries) < 0.5
    values = rng.normal(size=num_canaries) + mu * is_in
    return values[is_in], values[~is_in]


def audit(mu=0.8 * MU, *, independent=True, plan=PLAN, **options):
    return Audit.from_scores(
        *scores(mu, **options), plan=plan, attack="made-up scores", independent=independent
    )


@pytest.fixture(scope="module")
def weak():
    return audit()


@pytest.fixture(scope="module")
def strong():
    return audit(2 * MU)


def report(result):
    ledger = PLAN.ledger()
    ledger.charge(PLAN.noise_multiplier, PLAN.num_steps)
    return Report.from_ledger(
        ledger,
        steps_done=PLAN.num_steps,
        steps_planned=PLAN.num_steps,
        noise_multiplier=PLAN.noise_multiplier,
        mechanism=PLAN.mechanism,
        audit=result,
    )


def test_bounds_are_below_what_the_attack_is_and_ordered_by_what_they_assume(weak):
    assert weak.epsilon == PLAN.epsilon()
    assert weak.relation == "add_or_remove_one"
    of_plan, dependent, of_pairs = weak.summary().bounds
    truth = GaussianCurve(0.8 * MU).epsilon(PLAN.delta)
    assert truth > of_plan.epsilon > dependent.epsilon > of_pairs.epsilon > 0
    # The plan draws no batches, so that the two families are one.
    assert weak.lower_bound(method="gaussian").epsilon == pytest.approx(of_plan.epsilon, rel=0.02)
    assert (of_plan.num_canaries, of_plan.num_guesses) == (1000, 900)
    more = weak.lower_bound(0.999)
    assert more.epsilon < of_plan.epsilon
    assert more.confidence == 0.999


def test_a_bound_is_a_sentence_that_says_what_it_assumes(weak):
    texts = [str(bound) for bound in weak.summary().bounds]
    assert all(text.startswith("Epsilon is at least ") for text in texts)
    assert all("at delta 0.0001 (95 % confidence)" in text for text in texts)
    assert "some other noise multiplier" in texts[0]
    assert "independent" in texts[0]
    assert "fair coin" in texts[1]
    assert "independent" not in texts[1]
    assert texts[2].endswith("This assumes: Each canary was in by a separate fair coin.")
    nothing = audit(0.0).lower_bound()
    assert nothing.epsilon == 0
    assert str(nothing).startswith("No epsilon above 0 is shown")


@pytest.mark.seconds
def test_the_text_compares_with_the_guarantee_and_says_what_is_not_private(weak, strong):
    found = str(weak).replace("\n", " ")
    bound = weak.summary().bounds[0].epsilon
    assert f"at least epsilon {int(1000 * bound) / 1000:.3f} (95 % confidence)" in " ".join(
        found.split()
    )
    assert "not private" in found
    assert "up to 5 %" in found
    assert "Warning" not in found
    found = " ".join(str(strong).split())
    assert strong.summary().exceeds
    assert "The bound is above the guarantee. Either something is wrong, or this is chance" in found
    assert "Do not publish" in found
    assert "Audit again" in found


def test_the_file_holds_the_audit(weak):
    again = Audit.from_json(weak.to_json())
    np.testing.assert_array_equal(again.in_scores, weak.in_scores)
    np.testing.assert_array_equal(again.out_scores, weak.out_scores)
    assert again.plan == weak.plan
    assert again.independent
    assert again.attack == weak.attack
    assert again.lower_bound() == weak.lower_bound()
    infinite = Audit.from_scores([np.inf, 0.0], [-np.inf, 0.0], plan=PLAN)
    assert Audit.from_json(infinite.to_json()).in_scores.tolist() == [np.inf, 0.0]


def test_a_file_without_its_data_is_refused(weak):
    content = json.loads(weak.to_json())
    for name in ("in_scores", "plan", "num_steps", "independent"):
        less = {key: value for key, value in content.items() if key != name}
        with pytest.raises(ValueError, match=f"missing: \\['{name}'\\]"):
            Audit.from_json(json.dumps(less))
    for name, value in [
        ("in_scores", []),
        ("in_scores", [1.0, "high"]),
        ("out_scores", [1.0, None]),
        ("out_scores", "none"),
        ("independent", 1),
        ("attack", 3),
        ("in_scores", [1.0, 10**400]),
        ("plan", {}),
        ("num_steps", 0),
    ]:
        with pytest.raises((ValueError, TypeError)) as refusal:
            Audit.from_json(json.dumps(content | {name: value}))
        assert "got" in str(refusal.value) or "missing" in str(refusal.value)
    with pytest.raises(ValueError, match="cannot be read"):
        Audit.from_json(weak.to_json()[:-100])


@pytest.mark.untyped
def test_scores_that_are_no_scores_are_refused_and_not_shown():
    good = np.arange(10.0)
    for bad, words in [
        ([], "one score per canary"),
        (np.ones((5, 2)), r"shape \(5, 2\)"),
        ([1.0, np.nan, 7.125], "nan for 1 of 3 canaries. Do not leave"),
        (["a", "b"], "real numbers"),
        ([1j], "real numbers"),
        (np.array([1j]), "real numbers"),
        (["1.5"], "real numbers"),
    ]:
        for pair in ((bad, good), (good, bad)):
            with pytest.raises((ValueError, TypeError), match=words) as refusal:
                Audit.from_scores(*pair, plan=PLAN)
            assert "7.125" not in str(refusal.value)
    with pytest.raises(TypeError, match="plan must be"):
        Audit.from_scores(good, good, plan=None)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        Audit.from_scores(good, good, plan=PLAN, num_steps=0)
    # A text would count as true.
    with pytest.raises(TypeError, match="independent must be a bool"):
        Audit.from_scores(good, good, plan=PLAN, independent="no")


@pytest.mark.untyped
def test_bounds_that_cannot_be_had_are_refused():
    few = audit(num_canaries=6)
    with pytest.raises(ValueError, match=r"expected at least \d+ canaries for 95 % confidence"):
        few.lower_bound()
    assert "There is no lower bound on epsilon: expected at least" in " ".join(str(few).split())
    enough = audit(num_canaries=100)
    with pytest.raises(ValueError, match="confidence must lie strictly between"):
        enough.lower_bound(95)
    with pytest.raises(ValueError, match="method must be one of plan, gaussian, epsilon_delta"):
        enough.lower_bound(method="best")
    silent = audit(plan=PLAN.replace(noise_multiplier=0.0), num_canaries=100)
    with pytest.raises(ValueError, match="expected a plan with noise"):
        silent.lower_bound(method="plan")
    assert silent.lower_bound().method == "gaussian"


def test_the_roc_has_the_rates_of_all_thresholds_and_exact_intervals():
    small = Audit.from_scores([3.0, 2.0, 2.0], [2.0, 1.0], plan=PLAN)
    roc = small.roc(0.9)
    assert roc.true_positive_rates.tolist() == pytest.approx([0, 1 / 3, 1, 1])
    assert roc.false_positive_rates.tolist() == [0, 0, 0.5, 1]
    # None of two: at most 1 - 0.025^(1/2), with 0.025 for each of four ends.
    assert roc.false_positive_high[0] == pytest.approx(1 - 0.025**0.5)
    assert roc.true_positive_low[-1] == pytest.approx(0.025 ** (1 / 3))
    assert roc.false_positive_low[0] == 0
    assert roc.true_positive_high[-1] == 1


@pytest.mark.slow
def test_the_report_states_the_attack(weak, strong, tmp_path):
    found, plain = report(weak), report(None)
    bound = weak.summary().bounds[0]
    assert "What an attack reached" in str(found)
    assert "attack reached" not in str(plain)
    assert "made-up entries" in found.in_words()
    assert "made-up" not in plain.in_words()
    record = json.loads(found.to_json())["attack"]
    assert record["bounds"][0]["epsilon"] == bound.epsilon
    assert record["guarantee"] == PLAN.epsilon()
    assert json.loads(plain.to_json())["attack"] is None
    words = attack_in_words(strong.summary())
    assert "more than promised" in words
    assert "Do not publish" in words
    found.save_figure(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_report_of_another_run_is_refused():
    with pytest.raises(ValueError, match="expected an audit of this run"):
        report(audit(plan=PLAN.replace(delta=1e-5)))


def test_the_figure_shows_the_attack_within_its_intervals(weak, tmp_path):
    weak.save_figure(tmp_path / "deep" / "audit.png")
    assert (tmp_path / "deep" / "audit.png").stat().st_size > 10_000
    roc = weak.roc()
    assert (roc.true_positive_low <= roc.true_positive_rates).all()
    assert (roc.true_positive_rates <= roc.true_positive_high).all()
    assert (np.diff(roc.false_positive_rates) >= 0).all()


@pytest.mark.slow
def test_the_command_line_prints_an_audit(weak, tmp_path, capsys):
    path = tmp_path / "audit.json"
    path.write_text(weak.to_json())
    figure = tmp_path / "audit.png"
    assert main(["audit", str(path), "--figure", str(figure), "--confidence", "0.99"]) == 0
    out = capsys.readouterr().out
    assert "99 % confidence" in out
    assert figure.exists()
    assert main(["audit", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_in"] == len(weak.in_scores)
    path.write_text(audit(3 * MU).to_json())
    assert main(["audit", str(path)]) == 1
    assert "The bound is above the guarantee" in " ".join(capsys.readouterr().out.split())
    path.write_text(audit(num_canaries=6).to_json())
    assert main(["audit", str(path)]) == 2
    assert "canaries for 95 % confidence" in capsys.readouterr().err
    path.write_text(PLAN.to_json())
    assert main(["audit", str(path)]) == 2
    assert "is not an audit: expected a document of format" in capsys.readouterr().err
    path.write_bytes(b"\xff\xfe\x00")
    assert main(["audit", str(path)]) == 2
    assert dpoptax.audit.Audit is Audit
