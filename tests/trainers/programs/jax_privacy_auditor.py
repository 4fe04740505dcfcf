"""Gives the scores of an audit to JAX Privacy's auditor, and compares bounds and rates."""

import warnings

warnings.simplefilter("ignore", DeprecationWarning)

import numpy as np  # noqa: E402
from jax_privacy import auditing  # noqa: E402

import dpoptax  # noqa: E402
from dpoptax._attacks import _independent, _one_run  # noqa: E402
from dpoptax._attacks._curves import EpsilonDeltaCurve, GaussianCurve  # noqa: E402

DELTA, LEVEL = 1e-4, 0.05
plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(1000, 1000),
    clip=1.0,
    noise_multiplier=1.0,
    num_steps=1,
    delta=DELTA,
)
rng = np.random.default_rng(0)


def refuted_up_to(is_refuted, high=20.0):
    """The largest epsilon that is refuted."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def mu_at(epsilon):
    """The mu of the Gaussian curve with this epsilon."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        below = GaussianCurve(middle).epsilon(DELTA) < epsilon
        low, high = (middle, high) if below else (low, middle)
    return low


compared = 0
for mu in (1.0, 2.0, 4.0):
    is_in = rng.random(400) < 0.5
    scores = rng.normal(size=400) + mu * is_in
    audit = dpoptax.audit.Audit.from_scores(scores[is_in], scores[~is_in], plan=plan)
    auditor = auditing.CanaryScoreAuditor(audit.in_scores, audit.out_scores)
    for threshold in (0.5, 1.0, 2.0):
        strategy = auditing.Explicit(threshold)
        found = int((audit.in_scores >= threshold).sum())
        wrong = int((audit.out_scores >= threshold).sum())
        outcome = _one_run.Outcome(400, found + wrong, found, True, 1.0)
        theirs = auditor.epsilon_one_run(LEVEL, DELTA, threshold_strategy=strategy)
        ours = refuted_up_to(
            lambda epsilon, outcome=outcome: _one_run.epsilon_delta_is_refuted(
                outcome, epsilon, DELTA, LEVEL
            )
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        # They have one bound for guesses of both kinds.
        both = outcome._replace(one_sided=False)
        theirs = auditor.epsilon_one_run_fdp(LEVEL, DELTA, threshold_strategy=strategy)
        ours = refuted_up_to(
            lambda epsilon, both=both: _one_run.curve_is_refuted(
                both, GaussianCurve(mu_at(epsilon)), LEVEL
            )
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
        tighter = refuted_up_to(
            lambda epsilon, outcome=outcome: _one_run.curve_is_refuted(
                outcome, GaussianCurve(mu_at(epsilon)), LEVEL
            )
        )
        assert tighter >= ours - 1e-6
        trials = _independent.Trials(
            len(audit.in_scores),
            len(audit.out_scores),
            0,
            found,
            len(audit.in_scores),
            wrong,
            len(audit.out_scores),
        )
        theirs = auditor.epsilon_clopper_pearson(
            LEVEL, DELTA, one_sided=True, threshold_strategy=strategy
        )
        ours = refuted_up_to(
            lambda epsilon, trials=trials: _independent.rates_are_refuted(
                trials, EpsilonDeltaCurve(epsilon, DELTA), LEVEL
            )
        )
        # We also use the reverse: 1 - FPR <= e^epsilon (1 - TPR) + delta.
        assert ours >= theirs - 1e-4
        if theirs > ours - 1e-4:
            compared += 1
        compared += 2
    roc = audit.roc()
    area = np.trapezoid(roc.true_positive_rates, roc.false_positive_rates)
    # Theirs is the area of the convex hull.
    assert area <= auditor.attack_auroc() + 1e-9 < area + 0.03
    compared += 1
print(f"{compared} numbers agree")
