"""Interface between a resumable run and the folder that keeps it."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from dpoptax._pytree import PyTree
from dpoptax.training._resume.write_ahead_log import WriteAheadLog


class Restored(NamedTuple):
    """A state that was saved, and what was recorded with it."""

    state: Any
    step: int
    segment: int
    prng: str


@runtime_checkable
class Folder(Protocol):
    """Where a run is kept."""

    log: WriteAheadLog

    def restore(self, like: PyTree) -> Restored | None:
        """Returns the latest state, with the structure of `like`, or None if nothing was saved."""

    def save(self, step: int, state: PyTree, *, segment: int, prng: str) -> bool:
        """Writes a checkpoint of `step` done steps; returns whether it was written."""

    def close(self) -> None:
        """Frees the folder."""
