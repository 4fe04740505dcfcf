"""Privacy events from numbers that other libraries and papers use."""

import dp_accounting

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.clipping._count_noise import multiplier_of_gradients


@answer_foreign_names
def poisson_event(
    *, noise_multiplier: float, sampling_rate: float, num_steps: int
) -> dp_accounting.DpEvent:
    """Returns the event of Poisson sampling from the three numbers that Opacus uses.

    It is right only if every example took part in every step independently, with this probability.
    For shuffled batches or batches of fixed size it is wrong: use the sampler that ran instead.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound.
        sampling_rate: the probability that an example takes part in a step, from 0 to 1.
        num_steps: zero or more.

    Returns:
        An event for `event_epsilon`.

    Raises:
        TypeError: a count is not whole.
        ValueError: a number is out of range.

    Example:
        >>> from dpoptax.accounting import event_epsilon
        >>> event = poisson_event(noise_multiplier=1.5, sampling_rate=0.001, num_steps=100)
        >>> event_epsilon(event, delta=1e-6) < 0.0394  # the PRV accountant of Opacus returns this
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


def noise_with_private_quantile(noise_multiplier: float, quantile_noise_multiplier: float) -> float:
    """Returns the noise multiplier for gradients whose clip bound follows a private quantile.

    Adaptive clipping releases, at each step, a noisy count of the gradient norms below the clip
    bound. `dpoptax.clipping.QuantileClip` does so, and computes this number itself. For a count of
    your own, use the result as the noise multiplier of the gradients, and account
    `noise_multiplier`: both releases together then cost what the gradients alone would cost. The
    result is

        (noise_multiplier^-2 - (2 quantile_noise_multiplier)^-2)^(-1/2).

    Args:
        noise_multiplier: the one that is accounted.
        quantile_noise_multiplier: standard deviation of the noise on the count. One example moves
            the count by one half, once it is centred.

    Returns:
        A noise multiplier, larger than the one that is accounted.

    Raises:
        ValueError: a number is out of range; or the quantile alone costs more than the two may.

    Example:
        >>> round(noise_with_private_quantile(1.0, 10.0), 4)
        1.0013

    Reference: Andrew et al. 2021, arXiv:1905.03871, theorem 1.
    """
    accounted = _validate.positive("noise_multiplier", noise_multiplier)
    quantile = _validate.positive("quantile_noise_multiplier", quantile_noise_multiplier)
    gradients = multiplier_of_gradients(accounted, 2 * quantile)
    if gradients is None:
        raise ValueError(
            f"quantile_noise_multiplier must exceed half of noise_multiplier, {accounted / 2:g}; "
            f"got {quantile:g}: the quantile alone would cost more."
        )
    return gradients
