"""Numbers as other libraries and papers write them in, what this one accounts out."""

import math

import dp_accounting

from dpoptax import _validate


def poisson_event(
    *, noise_multiplier: float, sampling_rate: float, num_steps: int
) -> dp_accounting.DpEvent:
    """Returns the event of Poisson sampling from the three numbers that Opacus takes.

    It says that every example took part in every step with that probability, on its own. Of
    shuffled or full batches it must not be said: make the sampler that ran instead.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound.
        sampling_rate: probability of taking part in a step, from 0 to 1.
        num_steps: zero or more.

    Returns:
        An event for `event_epsilon`.

    Raises:
        TypeError: a count that is not whole.
        ValueError: a number out of range.

    Example:
        >>> from dpoptax.accounting import event_epsilon
        >>> event = poisson_event(noise_multiplier=1.5, sampling_rate=0.001, num_steps=100)
        >>> event_epsilon(event, delta=1e-6) < 0.0394  # what Opacus' PRV accountant gives
        True
    """
    noise = _validate.non_negative("noise_multiplier", noise_multiplier)
    steps = _validate.count("num_steps", num_steps, at_least=0)
    rate = _validate.non_negative("sampling_rate", sampling_rate)
    if rate > 1:
        raise ValueError(
            f"sampling_rate is a probability; got {rate:g}. For a batch of {rate:g} out of n "
            f"examples pass {rate:g} / n."
        )
    if steps == 0:
        return dp_accounting.NoOpDpEvent()
    gaussian = dp_accounting.GaussianDpEvent(noise)
    return dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps
    )


def noise_beside_quantile(noise_multiplier: float, quantile_noise_multiplier: float) -> float:
    """Returns the noise for gradients where a quantile of their norms is released beside them.

    A clip that follows a private quantile spends a share on it. With this much noise on the
    gradients, both together cost what gradients alone cost at `noise_multiplier`:

        noise = (noise_multiplier^-2 - (2 quantile_noise_multiplier)^-2)^(-1/2)

    Args:
        noise_multiplier: that is accounted.
        quantile_noise_multiplier: standard deviation of the noise on the number of norms below
            the clip; one example moves it by one half, once it is centred.

    Returns:
        The noise multiplier of the gradients, larger than that accounted.

    Raises:
        ValueError: a number out of range, or a quantile that alone costs more.

    Example:
        >>> round(noise_beside_quantile(1.0, 10.0), 4)
        1.0013

    Reference: Andrew et al. 2021, arXiv:1905.03871, theorem 1.
    """
    total = _validate.positive("noise_multiplier", noise_multiplier)
    quantile = _validate.positive("quantile_noise_multiplier", quantile_noise_multiplier)
    rest = total**-2 - (2 * quantile) ** -2
    if rest <= 0:
        raise ValueError(
            f"quantile_noise_multiplier must exceed half of noise_multiplier, {total / 2:g}; got "
            f"{quantile:g}: the quantile alone would cost more."
        )
    return 1 / math.sqrt(rest)
