"""The interface of a strategy: how the noise of a step depends on the noise of earlier steps."""

import abc
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Float64, Int

from dpoptax._pytree import PyTree


class Strategy(abc.ABC):
    """Base class of strategies: lower triangular matrices that correlate the noise of a run.

    The noise of step t is row t of `C^-1 Z`. `C` is the strategy, with `num_steps` rows, and `Z`
    has one independent normal draw per step and coordinate. `C` is scaled so that its largest
    column has norm one. So the standard deviation of `Z`, divided by the clip bound, is the noise
    multiplier for an example that takes part in one step.

    A strategy is a frozen value of numbers, because the noise keys are derived from its fields.

    Attributes:
        num_steps: how many steps the strategy covers. A longer run is refused.
        num_bands: how many diagonals of `C` may be nonzero, the main diagonal included.
        taps: the first column of `C^-1` up to its last nonzero number, where `C^-1` is Toeplitz and
            has few such numbers. Past draws are then made again from their keys, and the strategy
            needs no state. None where it does.

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153.
    """

    num_steps: int

    @property
    @abc.abstractmethod
    def num_bands(self) -> int: ...

    @property
    def taps(self) -> tuple[float, ...] | None:
        """See the class."""
        return None

    def init(self, like: PyTree[Float[Array, "..."]]) -> Any:
        """Returns the state before the first step, for noise of the shapes and types of `like`."""
        del like
        return ()

    def next(
        self, white: PyTree[Float[Array, "..."]], state: Any, step: Int[Array, ""]
    ) -> tuple[PyTree[Float[Array, "..."]], Any]:
        """Returns the noise of a step from its independent draws, and the next state.

        Only a strategy without `taps` needs it.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def matrix(self, num_steps: int | None = None) -> Float64[np.ndarray, "steps steps"]:
        """Returns the first `num_steps` rows and columns of `C`, scaled; all by default."""

    @abc.abstractmethod
    def noise_norms(self) -> Float64[np.ndarray, " steps"]:
        """Returns the norm of each row of `C^-1`: the standard deviation of each step's noise."""
