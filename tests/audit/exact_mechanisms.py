"""The best mechanism for an attacker, by linear programming: exact values for few canaries."""

import itertools

import numpy as np
import scipy.optimize
import scipy.sparse


class Lines:
    """The trade-off curve of everything that is (epsilon, delta)-private for several pairs."""

    def __init__(self, pairs):
        self.pairs = pairs
        self.epsilons, self.deltas = np.array(pairs).T

    def least_false_positive_rate(self, rate):
        found = (rate - self.deltas) * np.exp(-self.epsilons)
        missed = 1 - self.deltas - np.exp(self.epsilons) * (1 - rate)
        return float(max(found.max(), missed.max(), 0.0))

    def delta(self, epsilon):
        # Convex in exp(epsilon), so that a chord is above it.
        return float(np.interp(np.exp(epsilon), np.exp(self.epsilons), self.deltas))

    def epsilon(self, delta):
        return float(np.interp(-delta, -self.deltas, self.epsilons))


def guesses_of(num_canaries, num_in, num_out):
    """Every way to guess "in" (1), "out" (0) or nothing (None)."""
    for ones in itertools.combinations(range(num_canaries), num_in):
        rest = [canary for canary in range(num_canaries) if canary not in ones]
        for zeros in itertools.combinations(rest, num_out):
            yield tuple(
                1 if canary in ones else 0 if canary in zeros else None
                for canary in range(num_canaries)
            )


def largest_probability(num_canaries, num_in, num_out, num_correct, pairs):
    """The largest probability of so many right guesses, over all mechanisms that are private.

    A mechanism is a distribution over guesses for each outcome of the coins. It is private for all
    pairs of (epsilon, delta), for all neighbours.
    """
    coins = list(itertools.product((0, 1), repeat=num_canaries))
    guesses = list(guesses_of(num_canaries, num_in, num_out))
    size = len(coins) * len(guesses)
    right = [
        sum(guess == coin for guess, coin in zip(some, outcome, strict=True)) >= num_correct
        for outcome in coins
        for some in guesses
    ]
    flipped = [
        (first, coins.index((*coin[:j], 1 - coin[j], *coin[j + 1 :])))
        for first, coin in enumerate(coins)
        for j in range(num_canaries)
    ]
    # For each pair and neighbours: excess >= p - e^epsilon p', and the excesses sum to delta.
    each = np.arange(len(guesses))
    entries, limits = [], []
    for epsilon, delta in pairs:
        for first, second in flipped:
            row, excess = len(limits), size + len(entries) // 4 * len(guesses)
            entries += [
                (row + each, first * len(guesses) + each, 1.0),
                (row + each, second * len(guesses) + each, -np.exp(epsilon)),
                (row + each, excess + each, -1.0),
                (np.full(len(guesses), row + len(guesses)), excess + each, 1.0),
            ]
            limits += [*np.zeros(len(guesses)), delta]
    num_values = size + len(pairs) * len(flipped) * len(guesses)
    rows, columns, values = (
        np.concatenate(part)
        for part in zip(*((r, c, np.full(len(c), v)) for r, c, v in entries), strict=True)
    )
    table = scipy.sparse.csr_array((values, (rows, columns)), (len(limits), num_values))
    objective = np.zeros(num_values)
    objective[:size] = np.where(right, -1 / len(coins), 0.0)
    distributions = scipy.sparse.csr_array(
        (np.ones(size), (np.arange(size) // len(guesses), np.arange(size))),
        (len(coins), num_values),
    )
    found = scipy.optimize.linprog(
        objective, table, limits, distributions, np.ones(len(coins)), method="highs"
    )
    assert found.success
    return -found.fun
