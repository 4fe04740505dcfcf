"""Types of columns: which cells a column has, and how values become cells and cells become values.

Everything here is public. Cells come from the schema and never from the data. The cells of a
column stand in this order: bins of numbers, then special codes or categories, then "missing".
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
import numpy as np

from dpoptax.synthetic._draws import Draws

MISSING_WORDS = frozenset(["", "NA", "N/A", "NaN", "nan", "null", "None", "<NA>"])
MOST_CATEGORIES = 1000


class Encoded(NamedTuple):
    """A column as cells. Not private.

    Attributes:
        cells: the cell of each row.
        counted: the same, but values below and above the range have the two cells after the last.
    """

    cells: np.ndarray
    counted: np.ndarray


@attrs.frozen(kw_only=True)
class Column:
    """A column of the schema.

    Attributes:
        name: of the column.
        kind: `categorical`, `integer`, `real` or `omit`.
        edges: increasing edges of the bins of numbers; empty for a categorical column.
        codes: categories, or special values of a numeric column, as text.
        other: the category of values that are not listed; None to refuse them.
        missing: whether values may be missing.
        log: whether numbers are drawn on a logarithmic scale within a bin.
    """

    name: str
    kind: str
    edges: tuple[float, ...] = ()
    codes: tuple[str, ...] = ()
    other: str | None = None
    missing: bool = False
    log: bool = False

    @property
    def num_bins(self) -> int:
        """How many bins of numbers there are."""
        return max(len(self.edges) - 1, 0)

    @property
    def num_cells(self) -> int:
        """How many cells there are, without the two for values out of range."""
        return self.num_bins + len(self.codes) + self.missing

    @property
    def num_counted(self) -> int:
        """How many cells are counted: numbers below and above the range have one each."""
        return self.num_cells + 2 * (self.num_bins > 0)

    def label(self, cell: int) -> str:
        """Returns what a cell is called in a report."""
        if cell < self.num_bins:
            low, high = self.edges[cell], self.edges[cell + 1]
            return f"{low:g} to {high:g}"
        code = cell - self.num_bins
        return self.codes[code] if code < len(self.codes) else "missing"

    def encode(self, values: Sequence[Any]) -> Encoded:
        """Returns the cells of values.

        Raises:
            ValueError: a value is missing or not listed although the schema does not allow it, or
                is no number.
        """
        words = [_as_word(value, number=self.num_bins > 0) for value in values]
        cells = np.full(len(words), -1, np.int64)
        positions = {code: self.num_bins + i for i, code in enumerate(self.codes)}
        if self.missing:
            empty = self.num_bins + len(self.codes)
            positions |= {word: empty for word in MISSING_WORDS if word not in positions}
        rest = []
        for row, word in enumerate(words):
            if (cell := positions.get(word)) is None:
                rest.append(row)
            else:
                cells[row] = cell
        counted = cells
        if rest and self.num_bins:
            counted = cells.copy()
            cells[rest], counted[rest] = self._binned(self._numbers(words, rest))
        elif rest:
            self._refuse_missing(words, rest)
            if self.other is None:
                raise ValueError(
                    f"column {self.name!r} has values that the schema does not list. List them "
                    "under 'values', or say with 'other' which category they belong to."
                )
            cells[rest] = positions[self.other]
        return Encoded(cells, counted)

    def decode(self, cells: np.ndarray, rng: Draws) -> list[Any]:
        """Returns a value for each cell: a number that is uniform in its bin, a code, or None."""
        values: list[Any] = [None] * len(cells)
        labels = [*self.codes, None]
        numeric = cells < self.num_bins
        if numeric.any():
            drawn = iter(self._draw(cells[numeric], rng))
        for row, cell in enumerate(cells.tolist()):
            values[row] = next(drawn) if cell < self.num_bins else _as_value(self, labels, cell)
        return values

    def centres(self) -> np.ndarray:
        """Returns a number for the middle of each bin."""
        edges = np.asarray(self.edges)
        if self.kind == "integer":
            low, high = np.ceil(edges[:-1]), np.ceil(edges[1:]) - 1
            high[-1] = math.floor(edges[-1])
            return (low + high) / 2
        if self.log:
            return np.sqrt(edges[:-1] * edges[1:])
        return (edges[:-1] + edges[1:]) / 2

    def _draw(self, bins: np.ndarray, rng: Draws) -> list[Any]:
        edges = np.asarray(self.edges)
        low, high = edges[bins], edges[bins + 1]
        uniform = rng.uniform(len(bins))
        if self.kind == "integer":
            # The last bin holds its upper edge, the others do not.
            last = bins == self.num_bins - 1
            low, high = np.ceil(low), np.where(last, np.floor(high) + 1, np.ceil(high))
            if self.log:
                drawn = np.floor(np.exp(np.log(low) + uniform * np.log(high / low)))
            else:
                drawn = np.floor(low + uniform * (high - low))
            return np.clip(drawn, low, high - 1).astype(np.int64).tolist()
        if self.log:
            return np.clip(low * (high / low) ** uniform, low, high).tolist()
        return (low + uniform * (high - low)).tolist()

    def _numbers(self, words: list[str], rest: list[int]) -> np.ndarray:
        self._refuse_missing(words, rest)
        try:
            numbers = np.array([float(words[row]) for row in rest])
        except ValueError:
            numbers = np.array([math.nan])
        if np.isnan(numbers).any():
            raise ValueError(
                f"column {self.name!r} has values that are no numbers. List them under 'codes', or "
                "make the column 'categorical' or 'omit'."
            )
        if self.kind == "integer" and np.any(numbers != np.floor(numbers)):
            raise ValueError(
                f"column {self.name!r} is 'integer' in the schema, but has values that are not "
                "whole. Make it 'real'."
            )
        return numbers

    def _binned(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bins = np.searchsorted(np.asarray(self.edges[1:-1]), numbers, side="right")
        counted = np.where(numbers < self.edges[0], self.num_cells, bins)
        counted = np.where(numbers > self.edges[-1], self.num_cells + 1, counted)
        return bins, counted

    def _refuse_missing(self, words: list[str], rest: list[int]) -> None:
        if not self.missing and any(words[row] in MISSING_WORDS for row in rest):
            raise ValueError(
                f"column {self.name!r} has missing values. Set 'missing' to true in the schema."
            )


def _as_word(value: Any, *, number: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    word = str(value).strip()
    if number or isinstance(value, float | np.floating):
        # The code 0 may be written 0.0 in a file.
        with contextlib.suppress(ValueError, OverflowError):
            if word not in MISSING_WORDS and float(word).is_integer() and not word.isdecimal():
                return str(int(float(word)))
    return word


def _as_value(column: Column, labels: list[Any], cell: int) -> Any:
    label = labels[cell - column.num_bins]
    if label is None or column.kind == "categorical":
        return label
    # A special code of a numeric column is a number where it reads as one.
    try:
        return int(label) if column.kind == "integer" else float(label)
    except ValueError:
        return label
