"""Where keys and step numbers come from, and whether two of them are surely different.

A key is named by its path: the root, and how it was derived from there. A step number is a linear
form over numbers that are not known. Both are exact or unknown, so that "different" is never a
guess. In a loop, a carried value is a variable, and its value in a later iteration follows from a
substitution.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import attrs

from dpoptax.audit._known_keys import are_apart, same_root

# A root, followed by derivations. Each is a tuple that starts with its kind.
Path: TypeAlias = tuple[Any, ...]
# For each variable of a loop, what it is in the next iteration.
Next: TypeAlias = Mapping[Any, Any]

UNKNOWN = ("unknown",)
# Some iterations of a loop bound a key to a batch, if there were any.
BOUND_IN_LOOP = ("bound in a loop",)
# These make another key of a key.
_DERIVES = ("fold", "split", "bound", "released")
# Roots that the program makes of numbers.
_MADE = ("computed", "constant", "words", "written")

# Two numbers with a larger offset or factor may be equal in 32 bits, after some millions of steps.
_LARGEST_OFFSET, _LARGEST_FACTOR = 2**20, 2**15
# By how much a counter may grow in one iteration.
LARGEST_STRIDE = 2**5


@attrs.frozen
class Number:
    """A whole number: an offset plus multiples of numbers that are not known."""

    terms: frozenset[tuple[Any, int]] = frozenset()
    offset: int = 0

    @classmethod
    def of(cls, name: Any) -> "Number":
        """Returns the number of this name."""
        return cls(frozenset({(name, 1)}))

    def plus(self, other: "Number", factor: int = 1) -> "Number":
        """Returns `self + factor * other`."""
        total = dict(self.terms)
        for name, count in other.terms:
            total[name] = total.get(name, 0) + factor * count
        kept = frozenset((name, count) for name, count in total.items() if count)
        return Number(kept, self.offset + factor * other.offset)

    def in_32_bits(self) -> "Number | None":
        """Returns the number as a counter of 32 bits holds it; None if a run may wrap around."""
        if not self.terms:
            return Number(offset=(self.offset + 2**31) % 2**32 - 2**31)
        sizes = [abs(self.offset), *(abs(count) * _LARGEST_FACTOR for _, count in self.terms)]
        return self if max(sizes) <= _LARGEST_OFFSET else None


def next_number(number: Number, following: Next) -> Number | None:
    """Returns a number in the next iteration of a loop; None if it is not known."""
    total = Number(offset=number.offset)
    for name, count in number.terms:
        changed = _next_name(name, following)
        if changed is None:
            return None
        total = total.plus(changed, count)
    return total


def _next_name(name: Any, following: Next) -> Number | None:
    if name in following:
        return following[name]
    # A number of an inner loop has the number that it started from in its name.
    kind, loop, slot, *start = name
    if not start or not isinstance(start[0], Number):
        return Number.of(name)
    moved = next_number(start[0], following)
    # An inner loop may run more or less often in the next iteration: its numbers are other ones.
    base, outer = loop, following["loop"]
    while base[:1] == ("again",):
        base = base[1]
    again = ("again", loop) if base[: len(outer)] == outer else loop
    return None if moved is None else Number.of((kind, again, slot, moved))


def next_path(path: Path, following: Next) -> Path | None:
    """Returns a key in the next iteration of a loop; None if it is not known."""
    for length in range(len(path), 0, -1):
        if path[:length] in following:
            start = following[path[:length]]
            return None if start is None else _next_parts(start, path[length:], following)
    return _next_parts((), path, following)


def _next_parts(start: Path, parts: Path, following: Next) -> Path | None:
    moved = list(start)
    for part in parts:
        last = part[-1]
        if isinstance(last, Number):
            last = next_number(last, following)
            if last is None:
                return None
        elif part[0] == "split" and isinstance(last, tuple) and last[1] == following.get("loop"):
            last = (*last[:-1], last[-1] + 1)
        moved.append((*part[:-1], last))
    return tuple(moved)


def is_bound(path: Path) -> bool:
    """Whether a key is bound to a batch, or one that it was in a loop."""
    return any(part[0] in ("bound", BOUND_IN_LOOP[0]) for part in path)


def is_made(paths: Iterable[Path]) -> bool:
    """Whether a key may be one that the program computes from numbers, and not a secret one."""
    return any(path[0][1][0] in _MADE for path in paths)


def differ(
    first: Path,
    second: Path,
    *,
    as_ancestors: bool,
    numbers: Callable[[Number, Number], bool] | None = None,
) -> bool:
    """Whether two keys are surely different.

    With `as_ancestors`, a key and one that is derived from it count as different: noise keys are
    hashes of the state's key. Without it, they do not: a draw from a key may repeat what is derived
    from it. `numbers` says whether two numbers are surely different; by default `numbers_differ`.
    """
    for one, other in zip(first, second, strict=False):
        if one == other:
            if one == UNKNOWN:
                return False
            continue
        if one[0] == other[0] == "root":
            return are_apart(first, second) and all(
                differ(*pair, as_ancestors=as_ancestors, numbers=numbers)
                for pair in same_root(first, second)
            )
        return _parts_differ(one, other, numbers or numbers_differ)
    rest = first[len(second) :] or second[len(first) :]
    # A loop that makes no iteration leaves a key as it was.
    derived = any(part[0] in _DERIVES for part in rest)
    return as_ancestors and derived and UNKNOWN not in rest


def _parts_differ(one: Any, other: Any, numbers: Callable[[Number, Number], bool]) -> bool:
    kinds = {one[0], other[0]}
    if kinds in ({"fold"}, {"split"}):
        return one[1:-1] == other[1:-1] and _elements_differ(one[-1], other[-1], numbers)
    unclear = kinds & {UNKNOWN[0], BOUND_IN_LOOP[0]}
    if len(kinds) == 2 and kinds & {"bound", "released"} and not unclear:
        return True  # a hash of many bits, and something else
    # A key that a loop carries, and the key after the last iteration.
    return kinds == {"carried", "after"} and one[1:] == other[1:]


def _elements_differ(one: Any, other: Any, numbers: Callable[[Number, Number], bool]) -> bool:
    if isinstance(one, Number) and isinstance(other, Number):
        return numbers(one, other)
    # Elements that a scan goes through, by the iteration.
    return (
        isinstance(one, tuple)
        and isinstance(other, tuple)
        and one[:-1] == other[:-1]
        and one[-1] != other[-1]
    )


def numbers_differ(one: Number, other: Number) -> bool:
    """Whether two numbers are surely different."""
    apart = one.plus(other, -1)
    if not apart.terms:
        return apart.offset != 0
    if _is_below(one, other) or _is_below(other, one):
        return True
    # One number in a loop, and one that starts where this loop ends.
    counts = {count: name for name, count in apart.terms}
    if len(apart.terms) != 2 or set(counts) != {1, -1}:
        return False
    return _starts_after(counts[1], counts[-1], apart.offset) or _starts_after(
        counts[-1], counts[1], -apart.offset
    )


def always_differ(one: Number, other: Number) -> bool:
    """Whether two numbers differ in all iterations and calls: only written ones surely do."""
    return not one.terms and not other.terms and one.offset != other.offset


def is_beyond(later: Number, other: Number, ends: Mapping[Any, Any]) -> bool:
    """Whether a number of a later iteration differs from another one, also in all that follow.

    Counters grow, so a number that is larger now stays so. `ends` says for the last number of a
    loop inside another one the last number of that one, which is not smaller.
    """
    if not later.terms and not other.terms:
        return later.offset != other.offset
    apart = later.plus(other, -1)
    if not apart.terms:
        return apart.offset > 0
    if _is_below(other, later):
        return True
    counts = {count: name for name, count in apart.terms}
    if len(apart.terms) != 2 or set(counts) != {1, -1}:
        return False
    return _starts_after(counts[1], counts[-1], apart.offset, ends)


def _is_below(number: Number, other: Number) -> bool:
    """Whether `number` is below the value from which the loops of `other` count up."""
    bound: Number | None = other
    while bound is not None:
        apart = bound.plus(number, -1)
        if not apart.terms and apart.offset > 0:
            return True
        bound = _before_loop(bound)
    return False


def _before_loop(number: Number) -> Number | None:
    for name, count in number.terms:
        if name[0] in ("carried", "after") and count > 0:
            rest = Number(number.terms - {(name, count)}, number.offset)
            return rest.plus(name[3], count)
    return None


def _starts_after(
    later: Any, earlier: Any, apart: int, ends: Mapping[Any, Any] | None = None
) -> bool:
    """Whether `later` plus a constant counts on from where the loop of `earlier` ends."""
    if earlier[0] != "carried":
        return False
    last: Any = ("after", *earlier[1:])
    found = []
    while last is not None:
        found.append(frozenset({(last, 1)}))
        last = (ends or {}).get(last)
    number: Number | None = Number(frozenset({(later, 1)}), apart)
    while number is not None:
        if number.terms in found:
            return number.offset >= 0
        number = _before_loop(number)
    return False
