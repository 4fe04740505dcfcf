"""Sampler, clip, noise, steps and delta as one frozen value.

What clips, what noises and what is accounted all come from it, so no number is typed twice.
"""

import dataclasses
import fractions
import math

import dp_accounting
import optax
from jaxtyping import PRNGKeyArray

from dpoptax import _checks, accounting
from dpoptax.accounting import report as _report
from dpoptax.aggregation import privatize
from dpoptax.clipping import ClipRule, as_clip_rule, flat, noise_stddev
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Poisson, Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A private run, decided before it starts.

    Attributes:
        sampler: who takes part in each step.
        clip: a clip rule, or a float as the short form of `dpoptax.clipping.flat`.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound.
        num_steps: how many steps may run.
        delta: of the guarantee; strictly between 0 and 1, well below 1 / num_examples.

    Raises:
        TypeError: a field of the wrong kind.
        ValueError: a number out of range.

    Example:
        >>> import dpoptax
        >>> plan = Plan(
        ...     sampler=dpoptax.samplers.Poisson(60_000, 128),
        ...     clip=1.0,
        ...     noise_multiplier=1.1,
        ...     num_steps=9380,
        ...     delta=1e-5,
        ... )
        >>> round(plan.epsilon(), 3), round(plan.epsilon(relation="replace_one"), 3)
        (0.89, 1.541)
    """

    sampler: Sampler
    clip: ClipRule | float
    noise_multiplier: float
    num_steps: int
    delta: float

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise TypeError(
                "sampler must be one of dpoptax.samplers, which know their own law; got "
                f"{self.sampler!r}."
            )
        checked = {
            "clip": as_clip_rule(self.clip),
            "noise_multiplier": _checks.non_negative("noise_multiplier", self.noise_multiplier),
            "num_steps": _checks.count("num_steps", self.num_steps, at_least=0),
            "delta": _checks.open_unit("delta", self.delta),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        noise_stddev(self.clip_rule, self.noise_multiplier)

    @classmethod
    def calibrate(
        cls,
        *,
        num_examples: int,
        batch_size: float,
        epsilon: float,
        delta: float,
        l2_clip: float,
        epochs: float | None = None,
        num_steps: int | None = None,
    ) -> "Plan":
        """Returns the plan with the least noise that keeps Poisson sampling within a budget.

        Args:
            num_examples: how many examples there are.
            batch_size: the expected batch size, in examples.
            epsilon: the budget under add_or_remove_one.
            delta: strictly between 0 and 1, well below 1 / num_examples.
            l2_clip: the bound on one example's gradient norm.
            epochs: how often each example takes part on average; or
            num_steps: how many steps to plan. Give one of the two.

        Returns:
            A plan whose `epsilon()` is at most `epsilon`.

        Raises:
            TypeError: an argument of the wrong kind; both or none of epochs and num_steps.
            ValueError: a number out of range.

        Example:
            >>> plan = Plan.calibrate(
            ...     num_examples=1000, batch_size=100, epochs=5,
            ...     epsilon=2.0, delta=1e-5, l2_clip=1.0,
            ... )
            >>> plan.num_steps, plan.epsilon() <= 2.0
            (50, True)
        """
        if (epochs is None) == (num_steps is None):
            raise TypeError(
                f"give either epochs or num_steps; got epochs={epochs}, num_steps={num_steps}."
            )
        sampler = Poisson(num_examples, batch_size)
        if epochs is not None:
            # Exact: in floating point a ceiling or a floor can be one step off.
            passes = fractions.Fraction(str(_checks.positive("epochs", epochs)))
            size = fractions.Fraction(str(sampler.expected_batch_size))
            num_steps = math.ceil(passes * sampler.num_examples / size)
        steps = _checks.count("num_steps", num_steps)
        noise_multiplier = accounting.calibrate_noise_multiplier(
            epsilon=epsilon, delta=delta, sampler=sampler, num_steps=steps
        )
        return cls(
            sampler=sampler,
            clip=flat(l2_clip),
            noise_multiplier=noise_multiplier,
            num_steps=steps,
            delta=delta,
        )

    @property
    def clip_rule(self) -> ClipRule:
        """The clip rule, also where `clip` was given as a float."""
        return as_clip_rule(self.clip)

    def privatize(self, key: PRNGKeyArray) -> optax.GradientTransformation:
        """Returns the transformation of this plan; `key` serves its noise and nothing else."""
        return privatize(
            self.clip_rule, self.noise_multiplier, self.sampler.expected_batch_size, key
        )

    def event(
        self, num_steps: int | None = None, relation: Relation | None = None
    ) -> dp_accounting.DpEvent:
        """Returns dp-accounting's event for the first `num_steps` steps, all by default.

        Under the sampler's own relation, if no other is named.
        """
        steps = self._steps(num_steps)
        if steps == 0:
            return dp_accounting.NoOpDpEvent()
        if self.noise_multiplier == 0:
            return dp_accounting.NonPrivateDpEvent()
        parsed = parse_relation(relation or self.sampler.relation)
        return self.sampler.event(self.noise_multiplier, steps, parsed)

    def epsilon(
        self,
        num_steps: int | None = None,
        delta: float | None = None,
        relation: Relation | None = None,
    ) -> float:
        """Returns what the first `num_steps` steps cost, all by default; inf without noise.

        Under the sampler's own relation, if no other is named.
        """
        return accounting.epsilon(
            sampler=self.sampler,
            noise_multiplier=self.noise_multiplier,
            num_steps=self._steps(num_steps),
            delta=self.delta if delta is None else delta,
            relation=relation or self.sampler.relation,
        )

    def report(self, num_steps: int | None = None) -> str:
        """Returns the privacy statement for the first `num_steps` steps, all by default."""
        return _report.statement(self, self._steps(num_steps))

    def _steps(self, num_steps: int | None) -> int:
        if num_steps is None:
            return self.num_steps
        return _checks.count("num_steps", num_steps, at_least=0)
