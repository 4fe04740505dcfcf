"""Correlated noise: a placeholder with the fields that accounting reads."""

from typing import Any

import attrs

from dpoptax.mechanisms._strategy import Strategy


@attrs.frozen
class Correlated:
    """Noise that is correlated between the steps of a run.

    Attributes:
        strategy: how the noise of a step depends on the noise of earlier steps.

    Example:
        >>> import dpoptax
        >>> strategy = dpoptax.mechanisms.strategies.BandedToeplitz((1.0, 0.5), num_steps=10)
        >>> Correlated(strategy).strategy.num_bands
        2
    """

    strategy: Strategy = attrs.field()

    @property
    def num_steps(self) -> int:
        """How many steps a run may have: those of the strategy."""
        return self.strategy.num_steps

    @property
    def caveat(self) -> str:
        """See `Mechanism.caveat`."""
        return "noise is a floating-point Gaussian, treated as an exact Gaussian"

    def release(self, *args: Any) -> Any:
        """See `Mechanism.release`."""
        raise NotImplementedError

    def check(self, clip: Any, noise_multiplier: Any) -> None:
        """See `Mechanism.check`."""
