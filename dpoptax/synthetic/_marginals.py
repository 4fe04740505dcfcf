"""The marginal route: noisy one-way and selected two-way tables, and a graphical model of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from dpoptax.synthetic import _model
from dpoptax.synthetic._coarse import Coarse, shares
from dpoptax.synthetic._columns import Column, Encoded
from dpoptax.synthetic._draws import Draws
from dpoptax.synthetic._model import Clique, Table
from dpoptax.synthetic._releases import Releases
from dpoptax.synthetic._select import Pair, all_pairs, gains, spanning_tree

# Parts of the budget, in units of 1 / noise_multiplier**2.
ONE_WAY, SCORES, ROUNDS = 0.16, 0.02, (0.3, 0.24, 0.24)
MOST_CELLS = 100_000
EXPECTED_ROWS = 200_000
# How much more a pair with the target counts.
TARGET_WEIGHT = 3.0
ITERATIONS = 1000


@attrs.frozen(eq=False)
class Measured:
    """What was released of a table, and the model of it.

    Attributes:
        columns: by name.
        fine: the noisy counts of the cells of each column.
        outside: for numeric columns, the noisy number of values below and above the range.
        fine_stddev: by column, the standard deviation of their noise.
        total: the noisy number of rows.
        coarse: the coarse cells of each column.
        tables: the noisy tables that the model was fitted to.
        scores: the noisy scores of all pairs, by round.
        model: of mbi.
    """

    columns: dict[str, Column]
    fine: dict[str, np.ndarray]
    outside: dict[str, np.ndarray]
    fine_stddev: dict[str, float]
    total: float
    coarse: dict[str, Coarse]
    tables: tuple[Table, ...]
    scores: tuple[dict[Pair, float], ...]
    model: Any

    @property
    def sizes(self) -> dict[str, int]:
        """The number of coarse cells of each column."""
        return {name: coarse.size for name, coarse in self.coarse.items()}


def measure(
    encoded: Mapping[str, Encoded],
    columns: Mapping[str, Column],
    releases: Releases,
    noise_multiplier: float,
    rng: Draws,
    target: str | None = None,
) -> Measured:
    """Releases tables, within a budget of one Gaussian release of `noise_multiplier`."""

    def noise(part: float) -> float:
        return noise_multiplier / math.sqrt(part)

    names = list(columns)
    counted = [
        np.bincount(encoded[name].counted, minlength=columns[name].num_counted).astype(np.int64)
        for name in names
    ]
    noisy, stddevs = releases.release(counted, noise(ONE_WAY), _weights(counted))
    stddev = dict(zip(names, stddevs, strict=True))
    fine, outside = {}, {}
    for name, counts in zip(names, noisy, strict=True):
        fine[name], outside[name] = _without_outside(columns[name], counts)
    total = _total(list(fine.values()), stddevs)
    coarse = {name: Coarse.of(columns[name], fine[name], stddev[name], total) for name in names}
    sizes = {name: part.size for name, part in coarse.items()}
    cells = {name: coarse[name].group[encoded[name].cells] for name in names}
    pairs = all_pairs(names)
    exact = {
        pair: counts_of([cells[name] for name in pair], [sizes[name] for name in pair])
        for pair in pairs
    }
    tables: list[Table] = [
        Table((name,), coarse[name].sums(fine[name]), _stddev(coarse[name], stddev[name]))
        for name in names
    ]
    model, scores, left = None, [], 0.0
    for part in ROUNDS:
        left += part
        expected = _expected(model, tables, pairs, sizes, total, rng)
        distances = [
            np.abs(exact[pair] - guess).sum().reshape(1)
            for pair, guess in zip(pairs, expected, strict=True)
        ]
        found, _ = releases.release(distances, noise(SCORES))
        scores.append({pair: float(score[0]) for pair, score in zip(pairs, found, strict=True)})
        done = [table.columns for table in tables]
        chosen = _choose(scores[-1], sizes, done, total, noise(left), target)
        if not chosen:
            continue
        counted = [exact[pair] for pair in chosen]
        found, stddevs = releases.release(counted, noise(left), _weights(counted))
        tables, left = _merged([*tables, *map(Table, chosen, found, stddevs)]), 0.0
        model = _model.fit(sizes, tables, total, iterations=ITERATIONS, start=model)
    if left:
        # No other pair is worth its noise: what is left makes the tables so far more exact.
        again: list[Clique] = [table.columns for table in tables if len(table.columns) == 2]
        again = again or [table.columns for table in tables]
        counted = [
            counts_of([cells[name] for name in clique], [sizes[name] for name in clique])
            for clique in again
        ]
        found, stddevs = releases.release(counted, noise(left), _weights(counted))
        tables = _merged([*tables, *map(Table, again, found, stddevs)])
        model = _model.fit(sizes, tables, total, iterations=ITERATIONS, start=model)
    return Measured(
        dict(columns), fine, outside, stddev, total, coarse, tuple(tables), tuple(scores), model
    )


def _expected(
    model: Any,
    tables: Sequence[Table],
    pairs: Sequence[Pair],
    sizes: Mapping[str, int],
    total: float,
    rng: Draws,
) -> list[np.ndarray]:
    """Returns what the tables of pairs are expected to be, in whole rows."""
    if model is None:
        share = {table.columns[0]: shares(table.counts, total) for table in tables}
        guesses = [total * np.outer(share[first], share[second]) for first, second in pairs]
    else:
        # Draws are far cheaper than exact inference, which compiles a program for each pair.
        drawn = _model.Tables.of(model).draw(EXPECTED_ROWS, rng, independent=False)
        guesses = [
            total
            / EXPECTED_ROWS
            * counts_of([drawn[name] for name in pair], [sizes[name] for name in pair])
            for pair in pairs
        ]
    return [np.rint(guess).astype(np.int64) for guess in guesses]


def _choose(
    scores: Mapping[Pair, float],
    sizes: Mapping[str, int],
    done: Sequence[Clique],
    total: float,
    noise_multiplier: float,
    target: str | None,
) -> list[Pair]:
    """Returns the pairs to count next, by noisy scores."""
    pairs = list(scores)
    number = len(sizes) - 1
    counts = [sizes[first] * sizes[second] for first, second in pairs]
    stddev = noise_multiplier * math.sqrt(number)
    gain = dict(zip(pairs, gains(list(scores.values()), counts, stddev, total), strict=True))
    if len(done) == len(sizes):
        return [pair for pair in spanning_tree(list(sizes), gain) if gain[pair] > 0]
    gain = {pair: value * (TARGET_WEIGHT if target in pair else 1) for pair, value in gain.items()}
    chosen: list[Pair] = []
    for pair in sorted(gain, key=lambda pair: -gain[pair]):
        if gain[pair] <= 0 or len(chosen) == number:
            break
        if _model.model_cells(sizes, [*done, *chosen, pair]) <= MOST_CELLS:
            chosen.append(pair)
    return chosen


def _without_outside(column: Column, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the counts of cells, and those of values out of range, which are clamped."""
    inside, outside = counts[: column.num_cells].copy(), counts[column.num_cells :]
    if len(outside):
        inside[0] += outside[0]
        inside[column.num_bins - 1] += outside[1]
    return inside, outside


def _merged(tables: Sequence[Table]) -> list[Table]:
    """Averages tables of the same columns, by their precision. The order is that of the names."""
    merged: dict[Clique, Table] = {}
    for table in tables:
        if (other := merged.get(table.columns)) is not None:
            precisions = [other.stddev**-2, table.stddev**-2]
            counts = np.average([other.counts, table.counts], axis=0, weights=precisions)
            table = Table(table.columns, counts, sum(precisions) ** -0.5)
        merged[table.columns] = table
    return [merged[columns] for columns in sorted(merged, key=lambda key: (len(key), key))]


def _weights(tables: Sequence[np.ndarray]) -> list[float]:
    """Weights of the tables of a release: the total L1 error is least for cube roots of sizes."""
    return [float(table.size) ** (1 / 3) for table in tables]


def _total(tables: Sequence[np.ndarray], stddevs: Sequence[float]) -> float:
    """Returns the number of rows by the sums of noisy tables, weighted by their precision."""
    precisions = [
        1 / (table.size * stddev**2) for table, stddev in zip(tables, stddevs, strict=True)
    ]
    sums = [float(table.sum()) for table in tables]
    weighted = sum(p * s for p, s in zip(precisions, sums, strict=True)) / sum(precisions)
    return max(weighted, 1.0)


def _stddev(coarse: Coarse, stddev: float) -> float:
    """The standard deviation of sums of cells, on average."""
    return stddev * math.sqrt(len(coarse.group) / coarse.size)


def counts_of(cells: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Returns how many rows are in each cell of the joint table of some columns."""
    flat = np.ravel_multi_index(tuple(cells), tuple(sizes))
    return np.bincount(flat, minlength=math.prod(sizes)).reshape(sizes).astype(np.int64)
