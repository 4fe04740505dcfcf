"""Records of a data flow: what was drawn and released, and what is wrong whatever is returned."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs

from dpoptax.audit._labels import Reason, is_inside
from dpoptax.audit._origins import (
    Next,
    Number,
    Path,
    always_differ,
    differ,
    is_beyond,
    is_bound,
    next_number,
    next_path,
    numbers_differ,
)

# A reuse of noise shows after one iteration, or after two if two draws of a body take turns.
_ITERATIONS = 2
# How many iterations ahead a key is followed.
_AHEAD = 8


@attrs.frozen
class Event:
    """A batch that was drawn, or a release.

    Attributes:
        kind: `sample` or `release`.
        paths: the keys that it may have.
        numbers: the whole numbers that it depends on, None where one is not known.
        where: its line.
        branches: the branches of conditions that it is in.
        batch: of a release: the name of its batch.
        detail: the sampler, or what the transformation says of itself.
    """

    kind: str
    paths: frozenset[Path]
    numbers: tuple[Number | None, ...]
    where: str
    branches: tuple[tuple[Any, int], ...] = ()
    batch: Any = attrs.field(default=None, eq=False)
    detail: Any = attrs.field(default=None, eq=False)


class Records:
    """What a data flow found out beside labels."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.draws: list[Path] = []
        self.refusals: list[Reason] = []
        self._ends: dict[Any, Any] = {}
        self._branches: tuple[tuple[Any, int], ...] = ()

    def add(self, event: Event) -> None:
        """Records an event."""
        self.events.append(attrs.evolve(event, branches=self._branches))

    def draw(self, paths: Iterable[Path]) -> None:
        """Records that random bits were drawn from keys."""
        for path in paths:
            self.draws.append(path)
            # Such a key is a hash of the batch. Only the noise of a release hides it.
            if is_bound(path):
                what = "random numbers are drawn from a key that is bound to the batch"
                self.refuse(Reason(what, ""))

    def refuse(self, reason: Reason) -> None:
        """Records what is wrong whatever the step returns."""
        if reason not in self.refusals:
            self.refusals.append(reason)

    @contextlib.contextmanager
    def branch(self, name: Any, number: int) -> Iterator[None]:
        """Marks what happens inside as one branch of a condition."""
        outside, self._branches = self._branches, (*self._branches, (name, number))
        yield
        self._branches = outside

    def position(self) -> tuple[int, int, int]:
        """Returns how much is recorded, for `rewind`."""
        return len(self.events), len(self.draws), len(self.refusals)

    def rewind(self, position: tuple[int, int, int]) -> None:
        """Forgets what was recorded after a position."""
        for kept, count in zip((self.events, self.draws, self.refusals), position, strict=True):
            del kept[count:]  # type: ignore[attr-defined]

    def end_loop(self, start: tuple[int, int, int], following: Next) -> None:
        """Refuses a loop that draws the same batch or the same noise in two iterations."""
        inside, loop = self.events[start[0] :], following["loop"]
        for name, number in following.items():
            if name[:1] == ("carried",) and number is not None:
                last = [one for one, _ in number.terms if one[0] == "after"]
                self._ends |= dict.fromkeys(last, ("after", *name[1:]))
        self.refuse_bound(following.items(), self.draws[start[1] :])
        for event in inside:
            drawn = isinstance(event.batch, tuple)
            if event.kind == "release" and drawn and not is_inside(event.batch, loop):
                self.refuse(Reason("all iterations of a loop use one batch", event.where))
        for event in inside:
            later: Event | None = event
            for _ in range(_ITERATIONS):
                later = None if later is None else next_event(later, following)
                for other in inside:
                    if other.kind != event.kind:
                        continue
                    if later is None or not are_distinct(later, other, self.is_beyond):
                        self.refuse(_same(event, other, "in two iterations of a loop"))
                        return
        if self.draws_ahead(inside, self.draws[start[1] :], following):
            what = "random numbers are drawn from a key of another iteration of a loop"
            self.refuse(Reason(what, inside[0].where))

    def refuse_bound(self, following: Iterable[tuple[Any, Any]], draws: list[Path]) -> None:
        """Refuses draws from a key that is bound to a batch where it comes back."""
        for path, after in following:
            if not (path and isinstance(path[0], tuple) and isinstance(after, tuple)):
                continue  # a number, or the loop
            if is_bound(after) and any(draw[: len(path)] == path for draw in draws):
                what = "random numbers are drawn from a key that was bound to a batch before"
                self.refuse(Reason(what, ""))

    def is_beyond(self, later: Number, other: Number) -> bool:
        """Whether a number of a later iteration differs from another one from now on."""
        return is_beyond(later, other, self._ends)

    def draws_ahead(self, events: list[Event], draws: list[Path], following: Next) -> bool:
        """Whether random numbers are drawn from the key of an event of a later iteration."""
        return any(
            not differ(later, draw, as_ancestors=False)
            for event in events
            for path in event.paths
            for later in _moved(path, following)
            for draw in {*draws}
        )

    def end(self) -> None:
        """Refuses two releases with one noise, two draws of one batch, and shared randomness."""
        for place, event in enumerate(self.events):
            for other in self.events[:place]:
                if other.kind == event.kind and not _exclude_each_other(event, other):
                    if not are_distinct(event, other):
                        self.refuse(_same(event, other, "twice"))
                    drawn = isinstance(event.batch, tuple)
                    if event.kind == "release" and drawn and event.batch == other.batch:
                        self.refuse(Reason("two releases use one batch", event.where))
            if event.kind == "release" and self._is_drawn_from(event):
                what = "other random numbers are drawn from the key of the noise"
                self.refuse(Reason(what, event.where))

    def discarded(self, independent: tuple[type, ...]) -> Iterator[Reason]:
        """Yields batches without a release, of samplers that count on the batches before.

        In a cycle, an example takes part in one of several batches. If the others are discarded, it
        takes part in all releases.
        """
        releases = {
            (event.batch, event.branches) for event in self.events if event.kind == "release"
        }
        for event in self.events:
            counts = event.kind == "sample" and type(event.detail) not in independent
            if counts and (event.batch, event.branches) not in releases:
                what = "a batch is drawn and not released, but its sampler counts on all batches"
                yield Reason(what, event.where)

    def _is_drawn_from(self, release: Event) -> bool:
        return any(
            not differ(path, draw, as_ancestors=False, numbers=always_differ)
            for path in release.paths
            for draw in {*self.draws}
        )


def are_distinct(
    one: Event, other: Event, differing: Callable[[Number, Number], bool] = numbers_differ
) -> bool:
    """Whether two events surely have other keys or other numbers."""
    if any(
        first is not None and second is not None and differing(first, second)
        for first, second in zip(one.numbers, other.numbers, strict=False)
    ):
        return True
    pairs = [(first, second) for first in one.paths for second in other.paths]
    return bool(pairs) and all(
        differ(*pair, as_ancestors=True, numbers=differing) for pair in pairs
    )


def _moved(path: Path, following: Next) -> Iterator[Path]:
    """Yields a key in the next iterations of a loop, as long as it is derived further."""
    for _ in range(_AHEAD):
        later = next_path(path, following)
        if later is None or len(later) == len(path):
            return
        path = later
        yield path


def next_event(event: Event, following: Next) -> Event | None:
    """Returns an event in the next iteration of a loop; None if it is not known."""
    paths = [next_path(path, following) for path in event.paths]
    numbers = [None if one is None else next_number(one, following) for one in event.numbers]
    if any(path is None for path in paths):
        return None
    known = frozenset(path for path in paths if path is not None)
    return attrs.evolve(event, paths=known, numbers=tuple(numbers))


def _exclude_each_other(one: Event, other: Event) -> bool:
    numbers = dict(one.branches)
    return any(name in numbers and numbers[name] != number for name, number in other.branches)


def _same(event: Event, other: Event, when: str) -> Reason:
    what = {
        "release": "a release may draw the same noise",
        "sample": "a batch may be drawn",
        "count": "a release may have the same number",
    }
    also = "" if event.where == other.where else f" and {other.where}"
    return Reason(f"{what[event.kind]} {when}", event.where + also)
