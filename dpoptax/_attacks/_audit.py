"""Audit: the scores of an attack on a run, beside what the run guarantees."""

import contextlib
import pathlib
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from dpoptax import _validate
from dpoptax._attacks import _bounds
from dpoptax._attacks._bounds import METHODS, Method
from dpoptax._attacks._curves import PlanCurve, plan_loss
from dpoptax._attacks._lower_bound import LowerBound
from dpoptax._attacks._record import read_audit, write_audit
from dpoptax._attacks._roc import Roc, roc
from dpoptax._plan import Plan
from dpoptax._validate import described
from dpoptax.accounting import trade_off
from dpoptax.relations import parse_relation
from dpoptax.reports import _figure
from dpoptax.reports._attack import AttackSummary, as_text
from dpoptax.schedules import as_schedule


def _scores(instance: Any, field: Any, value: np.ndarray) -> None:
    """Refuses scores that are not a vector of numbers. Scores are not private: none is shown."""
    del instance
    if value.ndim != 1 or value.size == 0:
        raise ValueError(
            f"{field.name} must be a vector with one score per canary, and not empty; got an array "
            f"of shape {value.shape}. Pass the scores of canaries that were in, and of canaries "
            "that were out."
        )
    missing = int(np.isnan(value).sum())
    if missing:
        raise ValueError(
            f"{field.name} must be numbers; got nan for {missing:,} of {value.size:,} canaries. Do "
            "not leave these canaries out, for that can make an attack look better than it is. "
            "Find out why there is no score, or set it to one number for all of them, in or out."
        )


def _as_scores(scores: Any) -> np.ndarray:
    try:
        if np.asarray(scores).dtype.kind in "cSU":
            raise TypeError
        array = np.array(scores, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"scores must be real numbers; got {described(scores)}. Pass one number per canary."
        ) from None
    array.flags.writeable = False
    return array


@attrs.frozen(kw_only=True, eq=False)
class Audit:
    """The scores of an attack on a run, beside what the run guarantees.

    `fit(audit=...)` makes it, and `Audit.from_scores` makes it of an attack of your own. Print it,
    or write it with `to_json()` or `save_figure(path)`. Scores are computed from the data and from
    who was in. They are not private.

    Attributes:
        in_scores: the attack's score of each canary that was in, in the order of the canaries.
        out_scores: the same of each canary that was out.
        attack: what was done, in words.
        plan: the plan of the run. Its sampler counts the canaries among its examples.
        num_steps: how many steps were charged.
        independent: whether the scores are independent of each other, given who was in.

    Example:
        >>> import jax, numpy as np, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(1000, 1000), clip=1.0, noise_multiplier=0.5,
        ...     num_steps=1, delta=1e-4,
        ... )
        >>> noise = np.asarray(jax.random.normal(jax.random.key(0), (1000,)))  # of the release
        >>> audit = dpoptax.audit.Audit.from_scores(
        ...     noise[:500] + 2.0, noise[500:], plan=plan, attack="released value", independent=True
        ... )
        >>> audit.lower_bound().epsilon < audit.epsilon
        True
    """

    in_scores: np.ndarray = attrs.field(converter=_as_scores, validator=_scores, repr=False)
    out_scores: np.ndarray = attrs.field(converter=_as_scores, validator=_scores, repr=False)
    attack: str
    plan: Plan
    num_steps: int
    independent: bool = False
    # Of other noise multipliers of the plan: slow to compute, and used by several bounds.
    _curves: dict[float, PlanCurve] = attrs.field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.plan, Plan):
            raise TypeError(
                f"plan must be a dpoptax.Plan; got {described(self.plan)}. Pass that of the run."
            )
        _validate.count("num_steps", self.num_steps)
        for name, kind in (("attack", str), ("independent", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}; got {described(value)}.")

    @classmethod
    def from_scores(
        cls,
        in_scores: Any,
        out_scores: Any,
        *,
        plan: Plan,
        num_steps: int | None = None,
        attack: str = "an attack",
        independent: bool = False,
    ) -> "Audit":
        """Returns the audit of an attack of your own.

        Args:
            in_scores: the attack's score of each canary that was in: larger means "in". A canary is
                in by a separate fair coin. Scores of several runs may be put together.
            out_scores: the same of each canary that was out.
            plan: of the run. Its sampler counts the canaries among its examples.
            num_steps: how many steps were charged; by default all of the plan.
            attack: what was done, in words, such as "loss before minus loss after".
            independent: True if each score comes from a separate run, or if the canaries of a run
                do not influence each other's scores. Lower bounds are then much closer to epsilon.

        Returns:
            An `Audit`.

        Raises:
            TypeError: a score is not a number.
            ValueError: there are no scores, or some are nan.
        """
        return cls(
            in_scores=in_scores,
            out_scores=out_scores,
            attack=attack,
            plan=plan,
            num_steps=getattr(plan, "num_steps", 1) if num_steps is None else num_steps,
            independent=independent,
        )

    @property
    def epsilon(self) -> float:
        """The epsilon that the steps guarantee, under the relation of the sampler."""
        return self.plan.epsilon(self.num_steps)

    @property
    def relation(self) -> str:
        """Which data sets the guarantee compares."""
        return parse_relation(self.plan.sampler.relation).name.lower()

    @property
    def delta(self) -> float:
        """The delta of the guarantee, and of the lower bounds."""
        return self.plan.delta

    def lower_bound(
        self,
        confidence: float = 0.95,
        method: Method | None = None,
        independent: bool | None = None,
    ) -> LowerBound:
        """Returns a lower bound on epsilon, from all scores.

        If a run keeps its guarantee, its "plan" and "epsilon_delta" bounds exceed the epsilon of
        the guarantee with probability 1 - confidence at most. The choice of thresholds is paid for.

        Args:
            confidence: of the bound.
            method: "plan": what other noise multiplier of this plan the scores refute, and its
                epsilon; "gaussian": the same for one release with Gaussian noise (mu-GDP);
                "epsilon_delta": what (epsilon, delta) the scores refute, which assumes nothing
                about the run, and is far below the other two. By default "plan", or "gaussian" for
                a plan without noise.
            independent: True for bounds that need independent scores, False for bounds that hold
                whatever canaries have in common. By default as in the audit.

        Returns:
            A `LowerBound`. It says what it assumes.

        Raises:
            ValueError: there are too few canaries, or the method is unknown.
        """
        without_noise = as_schedule(self.plan.noise_multiplier).min == 0
        if method is None:
            method = "gaussian" if without_noise else "plan"
        if method not in METHODS:
            raise ValueError(
                f"method must be one of {', '.join(METHODS)}; got {described(method)}. Leave it "
                "out for the default."
            )
        if method == "plan" and without_noise:
            raise ValueError(
                "expected a plan with noise for method='plan'; got a noise multiplier of 0. Pass "
                "method='gaussian'."
            )
        return _bounds.lower_bound(
            self.in_scores,
            self.out_scores,
            _bounds.family_of(method, self.plan, self.num_steps, self._curves),
            delta=self.delta,
            confidence=confidence,
            method=method,
            independent=self.independent if independent is None else independent,
        )

    def roc(self, confidence: float = 0.95) -> Roc:
        """Returns the true and false positive rates of the attack, with their intervals.

        The intervals are exact for independent scores, at each threshold.
        """
        confidence = _validate.open_unit("confidence", confidence)
        return roc(self.in_scores, self.out_scores, confidence)

    def summary(self, confidence: float = 0.95) -> AttackSummary:
        """Returns the default lower bound and those that assume less, for a report."""
        bounds, refusal = [], ""
        try:
            bounds.append(self.lower_bound(confidence))
        except ValueError as error:
            refusal = str(error)
        else:
            # A bound that assumes less may need more canaries, or fair coins.
            if self.independent:
                with contextlib.suppress(ValueError):
                    bounds.append(self.lower_bound(confidence, independent=False))
            with contextlib.suppress(ValueError):
                bounds.append(self.lower_bound(confidence, "epsilon_delta", independent=False))
        return AttackSummary(
            attack=self.attack,
            num_in=len(self.in_scores),
            num_out=len(self.out_scores),
            confidence=confidence,
            guarantee=self.epsilon,
            bounds=tuple(bounds),
            refusal=refusal,
        )

    def __str__(self) -> str:
        return self.as_text()

    def as_text(self, confidence: float = 0.95) -> str:
        """Returns the audit in words, with its lower bounds at a confidence."""
        return as_text(self.summary(confidence))

    def to_json(self) -> str:
        """Returns the audit as JSON, which `from_json` and `dpoptax audit` read.

        It holds all scores. They are not private.
        """
        return write_audit(self)

    @classmethod
    def from_json(cls, text: str, *, classes: Iterable[type] = ()) -> "Audit":
        """Returns the audit that `to_json` wrote.

        Args:
            text: the JSON.
            classes: samplers, clip rules and mechanisms of your own that the plan has.

        Returns:
            An audit with the same scores.

        Raises:
            ValueError: the text is not such an audit.
        """
        return cls(**read_audit(text, classes))

    def save_figure(self, path: str | pathlib.Path) -> None:
        """Draws the attack beside the best attack that the guarantee allows.

        The file's ending is the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        loss = plan_loss(self.plan, self.num_steps)
        # Rates below one in all canaries cannot be measured.
        rates = np.geomspace(0.5 / len(self.out_scores), 1.0, 400)
        curves = _figure.AttackCurves(
            rates,
            trade_off.true_positive_rates(loss, rates),
            bounds={},
            marked={},
            unit=self.plan.sampler.unit,
            reached=self.roc(),
        )
        _figure.save_attack(pathlib.Path(path), curves, self.attack)
