"""Graphical models of coarse cells by the package `mbi`: the fit to noisy tables, and draws.

Reference: McKenna, Sheldon and Miklau 2019, "Graphical-model based estimation and inference for
differential privacy", arXiv:1901.09136.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import jax
import numpy as np

from dpoptax.synthetic._draws import Draws

Clique = tuple[str, ...]


def import_mbi() -> Any:
    """Imports mbi; its advice on global settings of JAX is not for our users."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("mbi")
    except ImportError as error:
        raise ImportError(
            "marginals need the package mbi: pip install 'dpoptax[synthetic]'. Or pass "
            "method='vae'."
        ) from error


@attrs.frozen(eq=False)
class Table:
    """A noisy table of counts.

    Attributes:
        columns: its axes.
        counts: the noisy counts, one axis for each column.
        stddev: the standard deviation of the noise of a count.
    """

    columns: Clique
    counts: np.ndarray
    stddev: float


@contextlib.contextmanager
def _double() -> Iterator[None]:
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_cells(sizes: Mapping[str, int], cliques: Sequence[Clique]) -> float:
    """Returns how many numbers the tables of a model have."""
    mbi = import_mbi()
    domain = mbi.Domain(tuple(sizes), tuple(sizes.values()))
    return mbi.junction_tree.hypothetical_model_size(domain, list(cliques)) * 2**20 / 8


def fit(
    sizes: Mapping[str, int],
    tables: Sequence[Table],
    total: float,
    *,
    iterations: int,
    start: Any = None,
) -> Any:
    """Returns the model of maximum entropy whose tables are closest to the noisy ones."""
    mbi = import_mbi()
    with _double():
        domain = mbi.Domain(tuple(sizes), tuple(sizes.values()))
        measured = [
            mbi.LinearMeasurement(table.counts.ravel(), table.columns, table.stddev)
            for table in tables
        ]
        estimator = mbi.estimation.MirrorDescent()
        return estimator.estimate(
            domain, measured, known_total=total, iters=iterations, warm_start=start
        )


@attrs.frozen(eq=False)
class Tables:
    """Expected tables of a model over the cliques of its junction tree, to draw rows from.

    Attributes:
        cliques: the expected counts of each clique.
        order: the columns in an order in which they can be drawn, each with those it depends on.
    """

    cliques: dict[Clique, np.ndarray]
    order: tuple[tuple[str, Clique], ...]

    @classmethod
    def of(cls, model: Any) -> "Tables":
        """Returns the tables of a model of mbi."""
        mbi = import_mbi()
        with _double():
            tree, order = mbi.junction_tree.make_junction_tree(
                model.domain, [tuple(clique) for clique in model.cliques]
            )
            cliques = [tuple(clique) for clique in tree.nodes]
            marginals = mbi.marginal_oracles.message_passing_stable(
                model.potentials.expand(cliques), model.total
            )
            tables = {
                clique: np.maximum(np.asarray(marginals[clique].values, float), 0)
                for clique in cliques
            }
        steps: list[tuple[str, Clique]] = []
        for column in reversed(order):
            drawn = {name for name, _ in steps}
            joined = {name for clique in cliques if column in clique for name in clique}
            steps.append((column, tuple(sorted(drawn & joined))))
        return cls(tables, tuple(steps))

    def project(self, columns: Clique) -> np.ndarray:
        """Returns the expected counts of columns that are in one clique."""
        clique = next(clique for clique in self.cliques if set(columns) <= set(clique))
        rest = tuple(axis for axis, name in enumerate(clique) if name not in columns)
        kept = [name for name in clique if name in columns]
        return self.cliques[clique].sum(axis=rest).transpose([kept.index(c) for c in columns])

    def draw(self, rows: int, rng: Draws, *, independent: bool) -> dict[str, np.ndarray]:
        """Draws rows: one column after the other, given its neighbours in the junction tree.

        Independent rows have the noise of a sample. Otherwise, each value is drawn as often as the
        model expects, but for rounding, which follows the model more closely.
        """
        drawn: dict[str, np.ndarray] = {}
        for column, given in self.order:
            table = self.project((*given, column))
            parent = np.zeros(rows, np.int64)
            if given:
                parent = np.ravel_multi_index(
                    tuple(drawn[name] for name in given), table.shape[:-1]
                )
            drawn[column] = _conditional(
                table.reshape(-1, table.shape[-1]), parent, rng, independent
            )
        return drawn


def _conditional(
    table: np.ndarray, parent: np.ndarray, rng: Draws, independent: bool
) -> np.ndarray:
    """Draws the last axis of a table given the first."""
    rows = len(parent)
    uniform = rng.uniform(rows)
    if not independent:
        # Within each parent, the rows in random order get evenly spaced quantiles.
        order = rng.order(rows)
        order = order[np.argsort(parent[order], kind="stable")]
        counts = np.bincount(parent, minlength=len(table))
        ranks = np.arange(rows) - (np.cumsum(counts) - counts)[parent[order]]
        offset = rng.uniform(len(table))[parent[order]]
        uniform[order] = (ranks + offset) / counts[parent[order]]
    ends = np.cumsum(table, axis=1)
    ends = ends / np.where(ends[:, -1:] > 0, ends[:, -1:], 1)
    drawn = np.empty(rows, np.int64)
    last = table.shape[1] - 1
    order = np.argsort(parent, kind="stable")
    present, starts = np.unique(parent[order], return_index=True)
    for which, block in zip(present, np.split(order, starts[1:]), strict=True):
        drawn[block] = np.minimum(np.searchsorted(ends[which], uniform[block], side="right"), last)
    return drawn
