"""Lower bounds from one run with many canaries, whatever the canaries have in common.

Each of m canaries is in by a separate fair coin. The k+ largest scores are guessed "in", the k-
smallest "out", and v of the r = k+ + k- guesses are right. The tests below refute a privacy claim
if so many right guesses have a probability of at most `level` under it. The release may depend on
all canaries in any way that the claim allows: for example, with a small probability it may reveal
all of them. So these bounds are far below the truth unless there are many thousands of canaries.

**(epsilon, delta)** (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2). Without delta,
whatever was released and whatever the other coins are, a guess is right with probability at most
q = e^epsilon / (1 + e^epsilon): Bayes' rule with a prior of one half. So v is at most
W ~ Binomial(r, q) in distribution. Each canary may break this bound with probability delta, and
then the guesses are right more often. The probability that this adds i right guesses costs at most
2 m delta / i, so that P(v or more) <= P(W >= v) + 2 m delta max_i P(v - i <= W < v) / i.

**A trade-off curve** (Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235). Let p_i be the
probability of i right guesses, and let canary j be drawn at random. The event that the guess of j
is right and that c or more guesses are right has the probability

    A_c = sum_{i >= c} i p_i / m.

Flip the coin of j: the same released values now make the guess of j wrong, and c - 1 or more right.
The flipped coins are as likely as the coins, so this event has under the other data set the
probability

    B_c = sum_{i >= c - 1} (r - i) p_i / m.

Neighbours differ in one canary, so B_c >= g(A_c), where g is the curve's least false positive rate,
which is convex (Jensen). If only "in" is guessed, A_c and B_c are halves of probabilities given
that j is in, or out: then B_c >= g(2 A_c) / 2, which is more. Suppose now that v or more guesses
are right with probability `level`. It is best for the attacker that all of it is at v. Then B_v
forces some probability on v - 1, A_{v-1} and B_{v-1} some on v - 2, and so on. If all of it
together exceeds one, the claim is refuted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special

from dpoptax._attacks._curves import Curve

# Of sums of probabilities.
ROUNDING = 1e-9


class Guesses(NamedTuple):
    """How many guesses are made, before the scores are seen, and what part of the error they get.

    Attributes:
        in_fraction: guesses "in" per canary.
        out_fraction: guesses "out" per canary.
        share: of the probability of a wrong bound.
    """

    in_fraction: float
    out_fraction: float
    share: float


# The first is the best for scores with normal noise and some hundred to some thousand canaries, by
# simulation. The others are for attacks that recognize few canaries, or only those that are in.
GRID = (
    Guesses(0.08, 0.08, 0.6),
    Guesses(0.02, 0.02, 0.1),
    Guesses(0.4, 0.4, 0.1),
    Guesses(0.08, 0.0, 0.1),
    Guesses(0.02, 0.0, 0.1),
)
MOST_GUESSES = 1000


class Outcome(NamedTuple):
    """What came of some guesses.

    Attributes:
        num_canaries: m.
        num_guesses: r.
        num_correct: v.
        one_sided: whether only "in" was guessed.
        share: of the probability of a wrong bound.
    """

    num_canaries: int
    num_guesses: int
    num_correct: int
    one_sided: bool
    share: float


def outcomes(in_scores: np.ndarray, out_scores: np.ndarray) -> list[Outcome]:
    """Returns what came of the guesses of the grid. A tie counts against the attacker."""
    num_canaries = len(in_scores) + len(out_scores)
    scores = np.concatenate([in_scores, out_scores])
    is_in = np.arange(num_canaries) < len(in_scores)
    # Largest first. Of equal scores, first those that are out: the guess "in" is wrong for them.
    found = []
    largest_first = is_in[np.lexsort((is_in, -scores))]
    # Smallest first. Of equal scores, first those that are in.
    smallest_first = is_in[np.lexsort((~is_in, scores))]
    for guesses in GRID:
        num_in, num_out = counts(guesses, num_canaries)
        correct = largest_first[:num_in].sum() + (~smallest_first[:num_out]).sum()
        found.append(
            Outcome(num_canaries, num_in + num_out, int(correct), num_out == 0, guesses.share)
        )
    return found


def perfect_outcomes(num_canaries: int) -> list[Outcome]:
    """Returns the outcomes of an attack that is always right."""
    found = []
    for guesses in GRID:
        num_in, num_out = counts(guesses, num_canaries)
        total = num_in + num_out
        found.append(Outcome(num_canaries, total, total, num_out == 0, guesses.share))
    return found


def counts(guesses: Guesses, num_canaries: int) -> tuple[int, int]:
    """Returns the numbers of guesses "in" and "out"."""

    def number(fraction: float) -> int:
        return min(math.ceil(fraction * num_canaries), num_canaries // 2, MOST_GUESSES)

    return number(guesses.in_fraction), number(guesses.out_fraction)


def curve_is_refuted(outcome: Outcome, curve: Curve, level: float) -> bool:
    """Returns whether so many right guesses are too unlikely under a trade-off curve."""
    num_canaries, num_guesses, num_correct, one_sided, _ = outcome
    least = (
        _halved(curve.least_false_positive_rate) if one_sided else curve.least_false_positive_rate
    )
    right = level * num_correct / num_canaries
    wrong = level * (num_guesses - num_correct) / num_canaries
    whole = num_guesses / num_canaries
    for already in range(num_correct - 1, -1, -1):
        forced = least(right)
        # Nothing is forced here or at any smaller number.
        if forced <= wrong:
            break
        right += already / (num_guesses - already) * (forced - wrong)
        wrong = forced
        if right + wrong > whole * (1 + ROUNDING):
            return True
    return False


def _halved(least: Callable[[float], float]) -> Callable[[float], float]:
    return lambda rate: least(min(2 * rate, 1.0)) / 2


def epsilon_delta_is_refuted(outcome: Outcome, epsilon: float, delta: float, level: float) -> bool:
    """Returns whether so many right guesses are too unlikely under (epsilon, delta)-privacy."""
    num_canaries, num_guesses, num_correct, _, _ = outcome
    accuracy = 1 / (1 + math.exp(-epsilon))
    # P(W >= k) for k = v, v - 1, ..., 0.
    tails = _at_least(np.arange(num_correct, -1, -1), num_guesses, accuracy)
    added = (tails[1:] - tails[0]) / np.arange(1, num_correct + 1)
    probability = tails[0] + 2 * num_canaries * delta * float(np.max(added, initial=0.0))
    return bool(probability <= level)


def _at_least(counts: np.ndarray, trials: int, probability: float) -> np.ndarray:
    """P(Binomial(trials, probability) >= counts)."""
    # A regularized incomplete beta function, which is not defined at zero.
    tails = scipy.special.betainc(np.maximum(counts, 1), trials - counts + 1, probability)
    return np.where(counts <= 0, 1.0, tails)
