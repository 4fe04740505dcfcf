"""Schema of a table: types, ranges and categories. It is public and never read from the data."""

import json
import math
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np

from dpoptax import _validate
from dpoptax.synthetic._columns import MOST_CATEGORIES, Column, Encoded

DEFAULT_BINS = 32
MOST_BINS = 1000
# Differences and whole numbers of this size stay exact enough.
LARGEST = 1e18
FIELDS = {
    "categorical": {"values", "other", "missing"},
    "integer": {"range", "bins", "edges", "log", "codes", "missing"},
    "real": {"range", "bins", "edges", "log", "codes", "missing"},
    "omit": set(),
}
# The same types under names that say more.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "positive": ("real", {"log": True}),
    "mixed": ("real", {}),
}


@attrs.frozen
class Schema:
    """Public schema of a table: what each column may hold.

    Make one with `Schema.from_dict` or `Schema.from_json`. A schema must not come from the data
    that it describes: choose ranges and categories from a code book or from common knowledge.

    Each column has a `type`:

    - `categorical`, with its `values`. `other` names the value that stands for all values that are
      not listed; without it they are refused.
    - `integer` or `real`, with a `range` of two numbers and a number of `bins` (32), or with the
      `edges` of the bins. `log: true` makes the bins equally wide on a logarithmic scale. Numbers
      out of range are clamped, and counted privately.
    - `positive`: real, on a logarithmic scale.
    - `mixed`: a number, or one of the special `codes`, such as 0 for "none". Integer and real
      columns may have codes too. Codes are not binned.
    - `omit`: the column is left out. This is the only way for free text and identifiers.

    Every type may have `missing: true`. The words "", NA, N/A, NaN, null and None are then missing
    values.

    Attributes:
        columns: by name, in the order of the schema; without those that are left out.
        omitted: the names of the columns that are left out.

    Raises:
        ValueError: the schema is not valid; the message names the column.

    Example:
        >>> schema = Schema.from_dict(
        ...     {
        ...         "columns": {
        ...             "age": {"type": "integer", "range": [17, 90], "bins": 10},
        ...             "work": {"type": "categorical", "values": ["yes", "no"], "missing": True},
        ...             "gain": {"type": "mixed", "codes": [0], "range": [1, 99999], "log": True},
        ...         }
        ...     }
        ... )
        >>> {name: column.num_cells for name, column in schema.columns.items()}
        {'age': 10, 'work': 3, 'gain': 33}
    """

    columns: dict[str, Column]
    omitted: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """Returns the schema that a JSON text describes."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"a schema is JSON; got a text that is none: {error}.") from None

    @classmethod
    def from_dict(cls, description: Any) -> "Schema":
        """Returns the schema of `{"columns": {name: {"type": ..., ...}, ...}}`."""
        entries = description.get("columns") if isinstance(description, Mapping) else None
        if not isinstance(entries, Mapping) or not entries or set(description) != {"columns"}:
            raise ValueError(
                'a schema is {"columns": {name: {"type": ...}, ...}} with one entry or more; got '
                "something else."
            )
        columns = {name: _column(name, entry) for name, entry in entries.items()}
        kept = {name: column for name, column in columns.items() if column.kind != "omit"}
        if len(kept) < 2:
            raise ValueError(
                f"a schema needs two columns that are not left out; got {len(kept)}. For a single "
                "column, release a noisy histogram."
            )
        return cls(kept, tuple(name for name in columns if name not in kept))

    def encode(self, table: Any) -> dict[str, Encoded]:
        """Returns the cells of a table: a mapping or data frame of columns by name. Not private.

        Raises:
            ValueError: the table does not fit the schema. The message shows no value.
        """
        if not hasattr(table, "keys"):
            raise TypeError(
                "table must be columns by name: a dict of lists, or a data frame; got "
                f"{_validate.described(type(table).__name__)}."
            )
        names = list(table.keys())
        if len(set(names)) != len(names):
            raise ValueError("two columns of the table have the same name.")
        listed = {*self.columns, *self.omitted}
        # Places and not names: without a header the names are a row of the data.
        if absent := [name for name in self.columns if name not in names]:
            raise ValueError(
                "the schema lists columns that the table does not have: "
                f"{', '.join(map(repr, absent))}. Does a CSV file have a header, and commas "
                "between its entries?"
            )
        for place, name in enumerate(names, 1):
            if name not in listed:
                raise ValueError(
                    f"the schema does not list column {place} of the table, counted from 1. List "
                    "it; the type 'omit' leaves a column out."
                )
        encoded = {}
        for name, column in self.columns.items():
            encoded[name] = column.encode(list(table[name]))
        lengths = {len(entry.cells) for entry in encoded.values()}
        if len(lengths) != 1:
            raise ValueError("the columns of a table must have the same number of rows.")
        return encoded


def _column(name: Any, entry: Any) -> Column:
    where = f"column {name!r} of the schema"
    if not isinstance(name, str) or not name:
        raise ValueError("the name of a column must be text, and not empty.")
    if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
        raise ValueError(f'{where} must be {{"type": ..., ...}}; got something else.')
    kind, defaults = ALIASES.get(entry["type"], (entry["type"], {}))
    if kind not in FIELDS:
        raise ValueError(
            f"{where} has the type {entry['type']!r}, which is none of "
            f"{', '.join(sorted({*FIELDS, *ALIASES}))}. Free text and identifiers cannot be "
            "synthesized: leave such a column out by the type 'omit'."
        )
    options = {**defaults, **{key: value for key, value in entry.items() if key != "type"}}
    if unknown := set(options) - FIELDS[kind]:
        raise ValueError(
            f"{where} has {', '.join(map(repr, sorted(unknown)))}; the type {entry['type']!r} "
            f"takes {', '.join(sorted(FIELDS[kind])) or 'no options'}."
        )
    if kind == "omit":
        return Column(name=name, kind=kind)
    for flag in ("missing", "log"):
        if not isinstance(options.get(flag, False), bool):
            raise ValueError(f"{where}: {flag!r} must be true or false.")
    if kind == "categorical":
        return _categorical(where, name, options)
    codes = _labels(where, "codes", options.get("codes", []))
    if entry["type"] == "mixed" and not codes:
        raise ValueError(f"{where} is 'mixed' and needs 'codes': the values that are not binned.")
    return Column(
        name=name,
        kind=kind,
        edges=_edges(where, kind, options),
        codes=codes,
        missing=options.get("missing", False),
        log=options.get("log", False),
    )


def _categorical(where: str, name: str, options: Mapping[str, Any]) -> Column:
    codes = _labels(where, "values", options.get("values", []))
    if not codes:
        raise ValueError(f"{where} is 'categorical' and needs 'values': a list of all categories.")
    if len(codes) > MOST_CATEGORIES:
        raise ValueError(
            f"{where} has {len(codes):,} values; at most {MOST_CATEGORIES:,} can be counted. Group "
            "them, or leave the column out by the type 'omit'."
        )
    other = options.get("other")
    if other is not None and str(other) not in codes:
        raise ValueError(
            f"{where}: 'other' must be one of its 'values'; got {str(other)!r}, which is not. Add "
            "it to 'values'."
        )
    return Column(
        name=name,
        kind="categorical",
        codes=codes,
        other=None if other is None else str(other),
        missing=options.get("missing", False),
    )


def _labels(where: str, field: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not all(
        isinstance(value, str | int | float) and not isinstance(value, bool) for value in values
    ):
        raise ValueError(f"{where}: {field!r} must be a list of texts and numbers.")
    labels = tuple(
        str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
        for value in values
    )
    if len(set(labels)) != len(labels):
        raise ValueError(f"{where}: {field!r} has an entry twice.")
    return labels


def _edges(where: str, kind: str, options: Mapping[str, Any]) -> tuple[float, ...]:
    log, edges = options.get("log", False), options.get("edges")
    if (edges is None) == ("range" not in options) or (edges is not None and "bins" in options):
        raise ValueError(f"{where} needs either a 'range' and a number of 'bins', or 'edges'.")
    given = options["range"] if edges is None else edges
    if not isinstance(given, list | tuple) or len(given) < 2:
        raise ValueError(f"{where}: a 'range' has two numbers, and 'edges' has two or more.")
    try:
        numbers = np.array([_validate.real(where, value) for value in given])
    except OverflowError:
        numbers = np.array([math.inf])
    if not np.all(np.abs(numbers) < LARGEST) or np.any(np.diff(numbers) <= 0):
        raise ValueError(
            f"{where}: range and edges must be finite and increase, to {LARGEST:g} at most."
        )
    if len(numbers) > MOST_BINS:
        raise ValueError(f"{where} has {len(numbers):,} edges; at most {MOST_BINS:,} are possible.")
    if kind == "integer" and np.any(np.ceil(numbers[1:]) - np.ceil(numbers[:-1]) < 1):
        # The last edge is a part of the last bin.
        inner = np.ceil(numbers[1:-1]) - np.ceil(numbers[:-2])
        if np.any(inner < 1) or math.floor(numbers[-1]) < math.ceil(numbers[-2]):
            raise ValueError(f"{where}: an 'integer' column has bins without a whole number.")
    if log and numbers[0] <= 0:
        raise ValueError(
            f"{where}: a logarithmic scale needs a range above 0. Make 0 one of its 'codes'."
        )
    if edges is not None:
        return tuple(numbers.tolist())
    if len(numbers) != 2:
        raise ValueError(f"{where}: a 'range' has two numbers; for more, pass 'edges'.")
    bins = _validate.count(f"{where}: bins", options.get("bins", DEFAULT_BINS))
    if bins > MOST_BINS:
        raise ValueError(f"{where} has {bins:,} bins; at most {MOST_BINS:,} can be counted.")
    low, high = numbers.tolist()
    return _equal_bins(low, high, bins, whole=kind == "integer", log=log)


def _equal_bins(low: float, high: float, bins: int, *, whole: bool, log: bool) -> tuple[float, ...]:
    # A whole number h stands for [h, h + 1); the last edge is part of the last bin.
    end = math.floor(high) + 1 if whole else high
    edges = np.geomspace(low, end, bins + 1) if log else np.linspace(low, end, bins + 1)
    if whole:
        edges = np.unique(np.ceil(edges - 1e-9))
        edges[-1] -= 1
        # A last bin of one number would have no width.
        if len(edges) > 2 and edges[-1] <= edges[-2]:
            edges[-1] = edges[-2] + 0.5
    else:
        edges[0], edges[-1] = low, high
    return tuple(edges.tolist())
