"""Utility report: how close synthetic tables are to the noisy ones. It reads nothing else.

The noisy tables are released already, so the report costs no privacy. It cannot be better than
they are: each row says how far apart they would be by noise alone.
"""

import math
from collections.abc import Sequence

import attrs
import numpy as np

from dpoptax.synthetic._coarse import shares
from dpoptax.synthetic._marginals import Measured, counts_of

MOST_ROWS_SHOWN = 20


@attrs.frozen
class Row:
    """One table of the utility report.

    Attributes:
        columns: of the table.
        distance: total variation between the synthetic table and the noisy one.
        noise: total variation that is due to the noise of the noisy one, on average.
    """

    columns: tuple[str, ...]
    distance: float
    noise: float


@attrs.frozen
class Utility:
    """How close the first synthetic set is to what was released.

    Attributes:
        rows: by table.
        clamped: by numeric column, the noisy number of values below and above its range, and the
            standard deviation of their noise.
        not_counted: the pairs that were never counted, and how far the model was from them when the
            pairs were last compared: a noisy total variation.
    """

    rows: tuple[Row, ...]
    clamped: dict[str, tuple[float, float, float]]
    not_counted: dict[tuple[str, str], float]

    def __str__(self) -> str:
        lines = ["Utility report", "", "  Total variation between synthetic and noisy tables", ""]
        for number, title in ((1, "one-way"), (2, "two-way, coarse cells")):
            chosen = [row for row in self.rows if len(row.columns) == number]
            if not chosen:
                continue
            mean = np.mean([row.distance for row in chosen])
            noise = np.mean([row.noise for row in chosen])
            lines.append(f"  {title}: {len(chosen)} tables, mean {mean:.4f}, noise {noise:.4f}")
            for row in sorted(chosen, key=lambda row: -row.distance)[:MOST_ROWS_SHOWN]:
                name = " x ".join(row.columns)
                lines.append(f"    {name:<44} {row.distance:.4f}   by noise alone {row.noise:.4f}")
        lines += [
            "",
            "  Pairs that were not counted, with the error of the model before its last fit",
        ]
        worst = sorted(self.not_counted.items(), key=lambda item: -item[1])[:MOST_ROWS_SHOWN]
        lines += [f"    {' x '.join(pair):<44} {error:.4f}" for pair, error in worst]
        lines += ["", "  Values out of range, which were clamped (noisy numbers)"]
        lines += [
            f"    {name:<44} {below:.0f} below, {above:.0f} above, +- {stddev:.0f}"
            for name, (below, above, stddev) in self.clamped.items()
        ]
        lines += [
            "",
            "  All numbers follow from what was released, so this report costs no privacy.",
        ]
        return "\n".join(lines)


def utility_of(measured: Measured, cells: dict[str, np.ndarray]) -> Utility:
    """Returns the report of one synthetic set."""
    rows = []
    for name, noisy in measured.fine.items():
        synthetic = counts_of([cells[name]], noisy.shape)
        rows.append(_row((name,), noisy, synthetic, measured.fine_stddev[name], measured.total))
    coarse = {name: part.group[cells[name]] for name, part in measured.coarse.items()}
    for table in measured.tables:
        if len(table.columns) == 2:
            synthetic = counts_of([coarse[name] for name in table.columns], table.counts.shape)
            rows.append(_row(table.columns, table.counts, synthetic, table.stddev, measured.total))
    counted = {table.columns for table in measured.tables}
    last = measured.scores[-1]
    return Utility(
        rows=tuple(rows),
        clamped={
            name: (float(outside[0]), float(outside[1]), measured.fine_stddev[name])
            for name, outside in measured.outside.items()
            if len(outside)
        },
        not_counted={
            pair: max(score, 0.0) / 2 / measured.total
            for pair, score in last.items()
            if pair not in counted
        },
    )


def _row(
    columns: Sequence[str], noisy: np.ndarray, synthetic: np.ndarray, stddev: float, total: float
) -> Row:
    released = shares(noisy.ravel(), total)
    distance = 0.5 * np.abs(released - synthetic.ravel() / max(synthetic.sum(), 1)).sum()
    # Where nothing is, noise is cut off at zero: it cannot move more than all mass.
    noise = min(0.5 * math.sqrt(2 / math.pi) * stddev * noisy.size / total, 1.0)
    return Row(tuple(columns), float(distance), noise)
