"""What a report says about attacks. Every probability of success is rounded up."""

from typing import Any

from dpoptax.accounting import trade_off
from dpoptax.accounting._epsilon import PrivacyLoss
from dpoptax.reports._round import round_up
from dpoptax.reports._values import ReportValues

FALSE_POSITIVE_RATES = (1e-3, 1e-2)
PRIORS = (0.5, 0.1, 0.01)
BASELINES = (0.1, 1e-2, 1e-3)


def best_attacker(loss: PrivacyLoss, delta: float) -> dict[str, Any]:
    """Returns the fields of a report on what the best possible attacker can find out."""
    found = trade_off.true_positive_rates(loss, list(FALSE_POSITIVE_RATES))
    guessed = trade_off.reconstruction_rates(loss, list(BASELINES))
    return {
        "advantage": trade_off.advantage(loss),
        "true_positive_rate": dict(zip(FALSE_POSITIVE_RATES, found.tolist(), strict=True)),
        "posterior_belief": {
            prior: trade_off.posterior_belief(loss, prior, delta) for prior in PRIORS
        },
        "reconstruction": dict(zip(BASELINES, guessed.tolist(), strict=True)),
        "mu": trade_off.dominating_mu(loss),
    }


def attacks_of(values: ReportValues) -> dict[str, str]:
    """Returns the rows of a report on membership inference and reconstruction."""
    unit = values.unit
    rates = "; ".join(
        f"{round_up(100 * found, 2)} % at most, if wrong about {100 * rate:g} % of the others"
        for rate, found in values.true_positive_rate.items()
    )
    beliefs = ", ".join(
        f"from {100 * prior:g} % to {round_up(100 * belief, 1)} %"
        for prior, belief in values.posterior_belief.items()
    )
    guesses = ", ".join(
        f"from {100 * baseline:g} % to {round_up(100 * found, 2)} %"
        for baseline, found in values.reconstruction.items()
    )
    correct = round_up(50 + 50 * values.advantage, 2)
    advantage = round_up(100 * values.advantage, 2)
    return {
        "Correct answers": f"{correct} % at most on whether one {unit} was used, where a guess "
        "gives 50 %; the true positive rate exceeds the false positive rate by at most "
        f"{advantage} percentage points",
        f"Used {unit}s recognized": rates,
        "Attacker's belief": f"that one {unit} was used can rise {beliefs} at most, except with "
        "probability delta",
        "Reconstruction": f"of one {unit}, or of one attribute of it: the chance of success can "
        f"rise {guesses} at most, above that of the best guess without the release",
        "At least as private as": "one value released with Gaussian noise (mu-GDP with mu = "
        f"{round_up(values.mu)})",
    }
