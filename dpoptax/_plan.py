"""Sampler, clip, noise, steps and delta as one frozen value.

What clips, what noises and what is accounted all come from it, so no number is typed twice.
"""

import dataclasses

import dp_accounting
import optax
from jaxtyping import PRNGKeyArray

from dpoptax import _serialize, _validate, accounting, reports
from dpoptax.accounting._epsilon import run_event
from dpoptax.clipping import ClipRule, FlatClip
from dpoptax.clipping._flat import as_clip_rule
from dpoptax.mechanisms import Gaussian, Mechanism
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Poisson, Sampler
from dpoptax.schedules import Scheduled, as_scheduled, checked
from dpoptax.transforms._privatize import privatize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A private run, decided before it starts.

    Attributes:
        sampler: who takes part in each step.
        clip: a clip rule, or its bound as the short form of `dpoptax.clipping.FlatClip`.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound. It
            and the clip bound may each be an Optax schedule, which is read at every planned step
            and kept as a `dpoptax.schedules.Schedule`.
        num_steps: how many steps may run.
        delta: of the guarantee; strictly between 0 and 1, well below 1 / num_examples.
        mechanism: how the noise is made, one of `dpoptax.mechanisms`; all are accounted alike.

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
    clip: ClipRule | Scheduled | optax.Schedule
    noise_multiplier: Scheduled | optax.Schedule
    num_steps: int
    delta: float
    mechanism: Mechanism = Gaussian()

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise TypeError(
                "sampler must be one of dpoptax.samplers, which know their own law; got "
                f"{self.sampler!r}."
            )
        num_steps = _validate.count("num_steps", self.num_steps, at_least=0)
        if num_steps >= 2**31:
            raise ValueError(
                f"num_steps must be below 2**31, where counting ends; got {num_steps}."
            )
        clip, noise = self.clip, as_scheduled(self.noise_multiplier, num_steps)
        if not isinstance(clip, ClipRule):
            clip = as_clip_rule(as_scheduled(clip, num_steps))
        fields = {
            "clip": clip,
            "noise_multiplier": checked("noise_multiplier", noise, _validate.non_negative),
            "num_steps": num_steps,
            "delta": _validate.open_unit("delta", self.delta),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.mechanism, Mechanism):
            raise TypeError(f"mechanism must be one of dpoptax.mechanisms; got {self.mechanism!r}.")
        self.mechanism.check(self.clip_rule, self.scheduled_noise)

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
        _validate.epochs_or_steps(epochs, num_steps)
        sampler = Poisson(num_examples, batch_size)
        if epochs is not None:
            num_steps = _validate.steps_of_epochs(epochs, num_examples, sampler.expected_batch_size)
        steps = _validate.count("num_steps", num_steps)
        noise_multiplier, _ = accounting.calibrate_noise_multiplier(
            epsilon=epsilon, delta=delta, sampler=sampler, num_steps=steps
        )
        return cls(
            sampler=sampler,
            clip=FlatClip(l2_clip),
            noise_multiplier=noise_multiplier,
            num_steps=steps,
            delta=delta,
        )

    @property
    def clip_rule(self) -> ClipRule:
        """The clip rule, also where `clip` was given as its bound."""
        assert isinstance(self.clip, ClipRule)  # __post_init__ has made it one
        return self.clip

    @property
    def scheduled_noise(self) -> Scheduled:
        """The noise multiplier, also where it was given as an Optax schedule."""
        return checked("noise_multiplier", self.noise_multiplier, _validate.non_negative)

    def privatize(self, key: PRNGKeyArray) -> optax.GradientTransformation:
        """Returns the transformation of this plan; `key` serves its noise and nothing else."""
        return privatize(
            self.clip_rule,
            self.scheduled_noise,
            expected_batch_size=self.sampler.expected_batch_size,
            key=key,
            mechanism=self.mechanism,
        )

    def event(
        self, num_steps: int | None = None, relation: Relation | None = None
    ) -> dp_accounting.DpEvent:
        """Returns dp-accounting's event for the first `num_steps` steps, all by default.

        Under the sampler's own relation, if no other is named.
        """
        parsed = parse_relation(relation or self.sampler.relation)
        return run_event(self.sampler, self.scheduled_noise, self._steps(num_steps), parsed)

    def privacy_loss(
        self, num_steps: int | None = None, relation: Relation | None = None
    ) -> accounting.PrivacyLoss:
        """Returns the privacy loss of the first `num_steps` steps, for further questions.

        Under the sampler's own relation, if no other is named.
        """
        parsed = parse_relation(relation or self.sampler.relation)
        event = self.event(num_steps, parsed)
        return accounting.event_privacy_loss(event, delta=self.delta, relation=parsed)

    def epsilon(
        self,
        num_steps: int | None = None,
        delta: float | None = None,
        relation: Relation | None = None,
        group_size: int = 1,
    ) -> float:
        """Returns what the first `num_steps` steps cost, all by default; inf without noise.

        Under the sampler's own relation, if no other is named.
        """
        parsed = parse_relation(relation or self.sampler.relation)
        return accounting.event_epsilon(
            self.event(num_steps, parsed),
            delta=self.delta if delta is None else delta,
            relation=parsed,
            group_size=group_size,
        )

    def ledger(self) -> accounting.Ledger:
        """Returns an empty ledger for a run of this plan."""
        return accounting.Ledger(self.sampler, self.clip_rule, delta=self.delta)

    def report(self, num_steps: int | None = None) -> reports.Report:
        """Returns the privacy statement for the first `num_steps` steps, all by default.

        Print it, or see `reports.Report` for JSON and a picture.
        """
        return reports._report.of_plan(self, self._steps(num_steps))

    def to_json(self) -> str:
        """Returns this plan as JSON, which `from_json` reads back.

        Raises:
            TypeError: a sampler or clip rule of your own, or `UserPoisson`, which holds whose every
                example is.
        """
        return _serialize.plan_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Returns the plan that `to_json` wrote.

        Raises:
            ValueError: text that is no such plan; nothing in it is guessed or passed over.
        """
        return cls(**_serialize.plan_fields(text))

    def _steps(self, num_steps: int | None) -> int:
        if num_steps is None:
            return self.num_steps
        return _validate.count("num_steps", num_steps, at_least=0)
