"""Limits on the risk of an attack, in place of an epsilon.

Calibration finds the noise for such a limit directly (Kulynych et al. 2024, arXiv:2407.02191). To
choose an epsilon from which the limit follows would take more noise, because one epsilon at one
delta allows attacks that the run does not.
"""

import abc
import functools
import math
from typing import Any

import attrs
import scipy.special

from dpoptax import _validate
from dpoptax.accounting import trade_off
from dpoptax.accounting._epsilon import PrivacyLoss

# `trade_off` reads the curve of a run for rates down to this one.
SMALLEST_RATE = 1e-8


def _real(name: str, **options: Any) -> Any:
    return attrs.field(converter=functools.partial(_validate.real, name), **options)


@attrs.frozen
class AttackRisk(abc.ABC):
    """A risk, and the largest value of it that a run may have."""

    limit: float = _real("limit")

    def __attrs_post_init__(self) -> None:
        name = type(self).__name__
        if not 0 < self.limit < 1:
            percent = f" {self.limit:g} % is {self.limit / 100:g}." if 1 < self.limit < 100 else ""
            raise ValueError(
                f"the limit of {name} is a probability, strictly between 0 and 1; got "
                f"{self.limit:g}.{percent} No noise reaches 0, and 1 needs no noise."
            )
        if self.without_release is None:
            return
        given, value = self.without_release
        if not SMALLEST_RATE <= value < 1:
            raise ValueError(
                f"{given} of {name} is a probability, from {SMALLEST_RATE:g} to below 1; got "
                f"{value:g}. Pass one in this range. Smaller ones are not computed."
            )
        if self.limit <= value:
            raise ValueError(
                f"the limit of {name} must be above {given}, which an attacker reaches without the "
                f"release; got {self.limit:g} and {given}={value:g}. Pass a larger limit."
            )

    @property
    @abc.abstractmethod
    def without_release(self) -> tuple[str, float] | None:
        """What an attacker reaches who sees nothing: the name of the field, and its value."""

    @abc.abstractmethod
    def bound(self, loss: PrivacyLoss, delta: float) -> float:
        """Returns the most that any attacker reaches on a run with this privacy loss."""

    @abc.abstractmethod
    def gaussian_mu(self, value: float, delta: float) -> float:
        """Returns the mu at which mu-GDP has this value of the risk; inf for a value of 1."""


@attrs.frozen
class Advantage(AttackRisk):
    """At most this difference of an attacker's true and false positive rates.

    The attacker answers whether one given example was used. At an advantage of 0.1 and even odds,
    55 of 100 answers are right at most.

    Attributes:
        limit: the largest advantage.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan.calibrate(
        ...     num_examples=1000, expected_batch_size=1000, clip=1.0, num_steps=1, delta=1e-5,
        ...     risk=Advantage(0.1),
        ... )
        >>> loss = plan.privacy_loss()
        >>> 0.0999 < dpoptax.accounting.trade_off.advantage(loss) <= 0.1
        True
    """

    @property
    def without_release(self) -> None:
        """None: a guess has no advantage, and every limit is above that."""

    def bound(self, loss: PrivacyLoss, delta: float) -> float:
        """Returns `trade_off.advantage(loss)`."""
        return trade_off.advantage(loss)

    def gaussian_mu(self, value: float, delta: float) -> float:
        """Returns the mu at which mu-GDP has this advantage."""
        return 2 * float(scipy.special.ndtri((1 + value) / 2))


@attrs.frozen
class TruePositiveRate(AttackRisk):
    """At most this share of the used examples is recognized, at a given false positive rate.

    Attributes:
        limit: the largest true positive rate.
        false_positive_rate: the share of other examples that the attacker is wrong about.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan.calibrate(
        ...     num_examples=1000, expected_batch_size=1000, clip=1.0, num_steps=1, delta=1e-5,
        ...     risk=TruePositiveRate(0.05, false_positive_rate=0.01),
        ... )
        >>> round(plan.noise_multiplier, 2)  # mu is Phi^-1(0.05) - Phi^-1(0.01) = 1 / 1.47
        1.47
    """

    false_positive_rate: float = _real("false_positive_rate", kw_only=True)

    @property
    def without_release(self) -> tuple[str, float]:
        """The false positive rate."""
        return "false_positive_rate", self.false_positive_rate

    def bound(self, loss: PrivacyLoss, delta: float) -> float:
        """Returns what `trade_off.true_positive_rates` says."""
        return float(trade_off.true_positive_rates(loss, [self.false_positive_rate])[0])

    def gaussian_mu(self, value: float, delta: float) -> float:
        """Returns the mu at which mu-GDP has this true positive rate."""
        return _mu_of_rates(self.false_positive_rate, value)


@attrs.frozen
class Reconstruction(AttackRisk):
    """At most this probability that an attacker reconstructs an example, or a part of it.

    `trade_off.reconstruction_rates` says what that means, and why it holds.

    Attributes:
        limit: the largest probability of success.
        baseline: the probability that the best guess without the release is a success.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan.calibrate(
        ...     num_examples=1000, expected_batch_size=1000, clip=1.0, num_steps=1, delta=1e-5,
        ...     risk=Reconstruction(0.2, baseline=0.1),
        ... )
        >>> rates = dpoptax.accounting.trade_off.reconstruction_rates(plan.privacy_loss(), [0.1])
        >>> rates.round(3)
        array([0.2])
    """

    baseline: float = _real("baseline", kw_only=True)

    @property
    def without_release(self) -> tuple[str, float]:
        """The baseline."""
        return "baseline", self.baseline

    def bound(self, loss: PrivacyLoss, delta: float) -> float:
        """Returns what `trade_off.reconstruction_rates` says."""
        return float(trade_off.reconstruction_rates(loss, [self.baseline])[0])

    def gaussian_mu(self, value: float, delta: float) -> float:
        """Returns the mu at which mu-GDP has this bound on reconstruction."""
        return _mu_of_rates(self.baseline, value)


@attrs.frozen
class PosteriorBelief(AttackRisk):
    """At most this belief that one given example was used, except with probability delta.

    Gaussian noise bounds no belief for every release. So this bound fails with the probability
    `delta` of the plan, over the noise and the batches; see `trade_off.posterior_belief`.

    Attributes:
        limit: the largest belief after the release.
        prior: the belief before it.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan.calibrate(
        ...     num_examples=1000, expected_batch_size=1000, clip=1.0, num_steps=1, delta=1e-5,
        ...     risk=PosteriorBelief(0.6, prior=0.5),
        ... )
        >>> loss = plan.privacy_loss()
        >>> 0.599 < dpoptax.accounting.trade_off.posterior_belief(loss, 0.5, 1e-5) <= 0.6
        True
    """

    prior: float = _real("prior", kw_only=True)

    @property
    def without_release(self) -> tuple[str, float]:
        """The prior."""
        return "prior", self.prior

    def bound(self, loss: PrivacyLoss, delta: float) -> float:
        """Returns what `trade_off.posterior_belief` says."""
        return trade_off.posterior_belief(loss, self.prior, delta)

    def gaussian_mu(self, value: float, delta: float) -> float:
        """Returns a mu at which mu-GDP has about this belief."""
        odds = float(scipy.special.logit(value) - scipy.special.logit(self.prior))
        return mu_of_epsilon(max(odds, 0.0), delta) if odds < math.inf else math.inf


def _mu_of_rates(false_positive_rate: float, true_positive_rate: float) -> float:
    """A Gaussian has TPR = Phi(Phi^-1(FPR) + mu)."""
    gap = scipy.special.ndtri(true_positive_rate) - scipy.special.ndtri(false_positive_rate)
    return float(gap)


def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """The mu at which a Gaussian mechanism has exactly this epsilon and delta."""
    import scipy.optimize  # slow to import

    def excess_delta(mu: float) -> float:
        gap = -epsilon / mu
        tail = math.exp(min(epsilon + scipy.special.log_ndtr(gap - mu / 2), 0.0))
        return float(scipy.special.ndtr(gap + mu / 2) - tail - delta)

    return float(scipy.optimize.brentq(excess_delta, delta, epsilon + 50.0, xtol=1e-15))
