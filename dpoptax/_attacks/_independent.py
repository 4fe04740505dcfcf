"""Lower bounds from canaries whose scores are independent of each other, given their coins.

Scores are independent if each canary had a separate run. They are independent in one run if the
canaries do not influence each other's scores: for example, each canary is one coordinate of the
gradient, each takes part independently, and the noise of coordinates is independent.

A few canaries, chosen by their position, are held out. They choose the thresholds. For the others
the thresholds are constants, and each guess is a separate trial. Two tests share the error.

**Accuracy.** Canaries with a score above the median of those that were held out are guessed "in",
the others "out". Let w be the part of the n guesses that are about canaries that are in. On average
over canaries, a guess is right with probability w TPR + (1 - w) (1 - FPR). With the larger of w and
1 - w as u, that is at most p = u + (1 - u) delta(log(u / (1 - u))), because TPR - e^epsilon FPR <=
delta(epsilon), in both directions. The number of right guesses is a sum of independent trials with
different probabilities, so it reaches v with probability at most P(Binomial(n, p) >= v) if
v >= n p + 1 (Hoeffding 1956, "On the distribution of the number of successes in independent
trials", theorem 4). With fair coins each guess is right with probability at most p too, whatever
its canary is, because p is least at w = 1 / 2. So canaries of different kinds are covered.

**Rates.** The true and the false positive rate at a second threshold have exact binomial intervals
(Clopper, Pearson 1934). The claim is refuted if it allows no rates within both. This finds attacks
that recognize few canaries with few errors, of those that are in or of those that are out.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import scipy.special

from dpoptax._attacks._curves import Curve

HELD_OUT = 0.1
# The parts of the probability of a wrong bound that the two tests get; the second pair is for the
# (epsilon, delta) family, whose best attack has few false positives.
SHARES = ((0.8, 0.2), (0.1, 0.9))
# Which part of all canaries is above the second threshold, or below it.
TAILS = (0.5, 0.25, 0.1, 0.05, 0.025)


class Trials(NamedTuple):
    """What came of the guesses about the canaries that were not held out.

    Attributes:
        num_in: how many of them were in.
        num_out: how many were out.
        num_correct: right guesses at the first threshold.
        found: canaries beyond the second threshold that the attack is right about.
        found_of: of how many.
        wrong: those that it is wrong about.
        wrong_of: of how many.
    """

    num_in: int
    num_out: int
    num_correct: int
    found: int
    found_of: int
    wrong: int
    wrong_of: int


def trials(in_scores: np.ndarray, out_scores: np.ndarray) -> Trials:
    """Returns what came of the guesses."""
    held_in, held_out = is_held_out("in", len(in_scores)), is_held_out("out", len(out_scores))
    # Thresholds come from some canaries, and guesses are about the others.
    chosen_in, chosen_out = in_scores[held_in], out_scores[held_out]
    rest_in, rest_out = in_scores[~held_in], out_scores[~held_out]
    both = np.concatenate([chosen_in, chosen_out])
    middle = float(np.quantile(both, 0.5, method="lower"))
    correct = int((rest_in > middle).sum() + (rest_out <= middle).sum())
    above, threshold = _second_threshold(chosen_in, chosen_out)
    if above:
        found, wrong = (rest_in > threshold).sum(), (rest_out > threshold).sum()
        sizes = len(rest_in), len(rest_out)
    else:
        found, wrong = (rest_out < threshold).sum(), (rest_in < threshold).sum()
        sizes = len(rest_out), len(rest_in)
    return Trials(len(rest_in), len(rest_out), correct, int(found), sizes[0], int(wrong), sizes[1])


def perfect_trials(num_canaries: int) -> Trials:
    """Returns the outcome of an attack that is always right, with half of the canaries in."""
    num_in = num_canaries // 2
    scores = np.ones(num_in), np.zeros(num_canaries - num_in)
    return trials(*scores)


def is_held_out(purpose: str, number: int) -> np.ndarray:
    """Returns which canaries choose the thresholds: by position, whatever their scores are."""
    # Fixed, so that an audit always has the same bound, and irregular, so that it does not matter
    # if somebody sorted the canaries.
    order = sorted(range(number), key=lambda i: hashlib.sha256(f"{purpose} {i}".encode()).digest())
    held = np.zeros(number, bool)
    held[order[: max(1, round(HELD_OUT * number))]] = True
    return held


def _second_threshold(in_scores: np.ndarray, out_scores: np.ndarray) -> tuple[bool, float]:
    """Returns on which side of which threshold the attack looks best, as a mu of mu-GDP."""
    both = np.concatenate([in_scores, out_scores])
    best, choice = -math.inf, (True, math.inf)
    for tail in TAILS:
        for above in (True, False):
            threshold = float(np.quantile(both, 1 - tail if above else tail, method="lower"))
            if above:
                found, wrong = (in_scores > threshold).mean(), (out_scores > threshold).mean()
            else:
                found, wrong = (out_scores < threshold).mean(), (in_scores < threshold).mean()
            # Rates of zero or one, of the few that were held out, are taken for a little more.
            low, high = 0.5 / len(both), 1 - 0.5 / len(both)
            rates = np.clip([found, wrong], low, high)
            mu = float(np.subtract(*scipy.special.ndtri(rates)))
            if mu > best:
                best, choice = mu, (above, threshold)
    return choice


def accuracy_is_refuted(outcome: Trials, curve: Curve, level: float) -> bool:
    """Returns whether so many right guesses are too unlikely under a trade-off curve."""
    total = outcome.num_in + outcome.num_out
    larger = max(outcome.num_in, outcome.num_out) / total
    if larger == 1:
        return False
    best = larger + (1 - larger) * curve.delta(math.log(larger / (1 - larger)))
    if outcome.num_correct < total * best + 1:
        return False
    tail = scipy.special.betainc(outcome.num_correct, total - outcome.num_correct + 1, best)
    return bool(tail <= level)


def rates_are_refuted(outcome: Trials, curve: Curve, level: float) -> bool:
    """Returns whether no rates within both intervals are on the curve or below it."""
    return curve.least_false_positive_rate(
        least_rate(outcome.found, outcome.found_of, level / 2)
    ) > (largest_rate(outcome.wrong, outcome.wrong_of, level / 2))


def least_rate(found: int, of: int, level: float) -> float:
    """Returns the lower end of a one-sided Clopper-Pearson interval."""
    return float(scipy.special.betaincinv(found, of - found + 1, level)) if found else 0.0


def largest_rate(found: int, of: int, level: float) -> float:
    """Returns the upper end of a one-sided Clopper-Pearson interval."""
    return float(scipy.special.betaincinv(found + 1, of - found, 1 - level)) if found < of else 1.0
