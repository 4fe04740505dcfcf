"""Settings of a resumable run: where checkpoints are kept, and how often they are written."""

import dataclasses
import os

from dpoptax import _validate
from dpoptax.training._check_arguments import check_folder


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a run is saved, and how often.

    Attributes:
        path: a folder for this run alone; it is created if necessary. It will hold keys, so it is
            as sensitive as the training data.
        every_seconds: time between two checkpoints, so the most that a crash can cost. A
            checkpoint is also written at the end.
        keep: how many checkpoints to keep, at least two: the last one may be damaged.

    Raises:
        TypeError: a number is of the wrong kind.
        ValueError: a number is out of range.

    Example:
        >>> Checkpoints("runs/mnist", every_seconds=300).keep
        2
    """

    path: str | os.PathLike[str]
    every_seconds: float = 60.0
    keep: int = 2

    def __post_init__(self) -> None:
        check_folder("path", self.path)
        _validate.non_negative("every_seconds", self.every_seconds)
        _validate.count("keep", self.keep, at_least=2)
