"""Options that say what a run may cost: an epsilon, or what an attack may reach."""

import argparse
from typing import Any, NamedTuple

from dpoptax import accounting
from dpoptax.accounting._attack_risk import AttackRisk


class _Risk(NamedTuple):
    """Options of a risk: that of its limit, that of its other number, and what it is in words."""

    make: Any
    given: str | None
    words: str


RISKS = {
    "advantage": _Risk(
        lambda limit, _: accounting.Advantage(limit), None, "attack advantage {limit:g}"
    ),
    "tpr": _Risk(
        lambda limit, given: accounting.TruePositiveRate(limit, false_positive_rate=given),
        "fpr",
        "true positive rate {limit:g} at false positive rate {given:g}",
    ),
    "posterior": _Risk(
        lambda limit, given: accounting.PosteriorBelief(limit, prior=given),
        "prior",
        "belief {limit:g} from {given:g}, except with probability delta",
    ),
    "reconstruction": _Risk(
        lambda limit, given: accounting.Reconstruction(limit, baseline=given),
        "baseline",
        "reconstruction in {limit:g} of cases, where a blind guess gives {given:g}",
    ),
}


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    """Adds epsilon, and the risks that may take its place."""
    limits = parser.add_mutually_exclusive_group(required=True)
    limits.add_argument("--epsilon", type=float, metavar="EPS", help="the budget")
    limits.add_argument(
        "--advantage",
        type=float,
        metavar="A",
        help="in place of --epsilon: by how much the true positive rate of an attacker may exceed "
        "the false positive rate",
    )
    limits.add_argument(
        "--tpr",
        type=float,
        metavar="R",
        help="in place of --epsilon: the largest true positive rate of an attacker, at --fpr",
    )
    limits.add_argument(
        "--posterior",
        type=float,
        metavar="P",
        help="in place of --epsilon: the largest belief of an attacker who believed --prior before",
    )
    limits.add_argument(
        "--reconstruction",
        type=float,
        metavar="P",
        help="in place of --epsilon: how often an example may be reconstructed at most, where a "
        "blind guess succeeds with probability --baseline",
    )
    for name in ("fpr", "prior", "baseline"):
        limit = next(limit for limit, risk in RISKS.items() if risk.given == name)
        parser.add_argument(f"--{name}", type=float, metavar="P", help=f"goes with --{limit}")
    parser.add_argument(
        "--delta", type=float, required=True, metavar="D", help="of the budget; well below 1 / N"
    )


def risk_of(options: argparse.Namespace) -> tuple[AttackRisk | None, str]:
    """Returns the risk that the options limit, and what it is in words; None for an epsilon."""
    found: AttackRisk | None = None
    words = ""
    for name, risk in RISKS.items():
        limit = getattr(options, name)
        given = None if risk.given is None else getattr(options, risk.given)
        if risk.given is not None and (limit is None) != (given is None):
            raise ValueError(
                f"give --{name} and --{risk.given} together; got only one of them. Add the other."
            )
        if limit is not None:
            found, words = risk.make(limit, given), risk.words.format(limit=limit, given=given)
    return found, words
