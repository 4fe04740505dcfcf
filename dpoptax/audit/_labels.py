"""Labels: what a value in a program depends on.

The data part of a label is one of

- nothing: the value does not depend on private data, or only through a release,
- rows: along one axis, entry i depends on example i of a batch and on public numbers only,
- mixed: anything else.

Rows may be clipped per example. Mixed values may not.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from dpoptax.audit._origins import Number, Path


@attrs.frozen
class Rows:
    """A value with one row per example.

    Attributes:
        axis: of the examples; None if the whole value belongs to one example.
        batch: which examples: `DATA` for all of them, else the place where they were drawn.
    """

    axis: int | None
    batch: Any


@attrs.frozen
class Reason:
    """Why a value is private: what happened, and where in the source."""

    what: str
    where: str


@attrs.frozen
class Mixed:
    """The data part of a value that may depend on several examples."""


@attrs.frozen
class Ordered:
    """What must move on together in the state of `privatize`, as the last release left it.

    Attributes:
        number: of the state.
        position: of the leaf among those that move on together.
        version: which release left it, or which loop carries it.
    """

    number: int
    position: int
    version: Any


DATA = "all examples"
MIXED = Mixed()


@attrs.frozen
class Label:
    """What a value depends on.

    Attributes:
        data: see the module.
        draws: the keys whose random bits are in the value.
        paths: for a key, or the words of one, which keys it may be.
        declared: the random bits come from the state of a sampler, which is secret by contract.
        released: a private release is among its inputs.
        number: which whole number it is, if that is known.
        uniform: the value of all its elements, if they are known and equal.
        words: for an array that may hold the words of a key: where it comes from, and its bytes.
        mark: `indices` or `mask` of a batch, as the sampler drew it.
        zero_padding: padded rows are zero.
        state: the state that it belongs to, as the sampler or the last release left it.
        reason: why the value is private.
    """

    data: Rows | Mixed | None = None
    draws: frozenset[Path] = frozenset()
    paths: frozenset[Path] = frozenset()
    declared: bool = False
    released: bool = False
    number: Number | None = None
    uniform: Any = None
    words: Any = None
    mark: str | None = None
    zero_padding: bool = False
    state: Any = None
    reason: Reason | None = attrs.field(default=None, eq=False)

    @property
    def rows(self) -> Rows | None:
        """The data part, if it is rows."""
        return self.data if isinstance(self.data, Rows) else None

    @property
    def is_clean(self) -> bool:
        """Whether the value depends on data through releases only."""
        return self.data is None


PUBLIC = Label()


def dependent(labels: Iterable[Label], data: Rows | Mixed | None, reason: Any) -> Label:
    """Returns the label of a value that is computed from others, with this data part."""
    labels = list(labels)
    found = first_reason(labels) or reason
    draws = frozenset().union(*(one.draws | one.paths for one in labels))
    return Label(
        data=data,
        draws=draws,
        released=any(one.released for one in labels),
        reason=found if data is not None else None,
    )


def first_reason(labels: Iterable[Label]) -> Reason | None:
    """Returns the reason of the first label that is private."""
    return next((one.reason for one in labels if isinstance(one.data, Mixed) and one.reason), None)


def common_rows(labels: Sequence[Label]) -> Rows | None:
    """Returns the rows that all private ones among the labels have in common; None if they differ.

    Also None if one of them is no rows.
    """
    found = {one.data for one in labels if one.data is not None}
    if len(found) != 1:
        return None
    (data,) = found
    return data if isinstance(data, Rows) else None


def join(one: Label, other: Label) -> Label:
    """Returns the label of a value that is one of two."""
    if one == other:
        return one
    if one.data is None or other.data is None:
        data = one.data or other.data
    else:
        data = one.data if one.data == other.data else MIXED
    drawing = [label for label in (one, other) if label.draws]
    reason = Reason("two batches meet in one value", "") if data == MIXED else None
    return Label(
        data=data,
        draws=one.draws | other.draws,
        paths=one.paths | other.paths,
        declared=bool(drawing) and all(label.declared for label in drawing),
        released=one.released or other.released,
        number=one.number if one.number == other.number else None,
        uniform=one.uniform if _same(one.uniform, other.uniform) else None,
        words=one.words if one.words == other.words else None,
        mark=one.mark if one.mark == other.mark and one.data == other.data else None,
        zero_padding=one.zero_padding and other.zero_padding and one.data == other.data,
        state=one.state if one.state == other.state else None,
        reason=one.reason or other.reason or reason,
    )


def is_inside(batch: Any, name: Any) -> bool:
    """Whether a batch was drawn in an iteration of a loop, or is what a scan goes through."""
    if not isinstance(batch, tuple):
        return False
    if batch[:1] == ("each",):
        return batch[1] == name or is_inside(batch[1], name) or is_inside(batch[2], name)
    return batch[: len(name)] == name


def _same(one: Any, other: Any) -> bool:
    return one is not None and type(one) is type(other) and one == other
