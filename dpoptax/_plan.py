"""Plan: sampler, clip rule, noise, number of steps and delta of a private run, as one frozen value.

The transformation that clips and adds noise, and the accountant, both read the plan. So no number
is typed twice, and the numbers that run are the numbers that are accounted.
"""

from collections.abc import Iterable
from typing import Any

import attrs
import dp_accounting
import optax
from jaxtyping import PRNGKeyArray

from dpoptax import _plan_arguments as _arguments
from dpoptax import _serialize, _validate, accounting
from dpoptax._foreign_names import answer_foreign_names
from dpoptax.accounting._attack_risk import AttackRisk
from dpoptax.accounting._epochs import num_steps_of
from dpoptax.accounting._epsilon import PrivacyLoss, event_privacy_loss, resolve_relation, run_event
from dpoptax.accounting._smallest_batch import calibrate_with_smallest_batch, with_smallest_batch
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._count_noise import split_noise
from dpoptax.clipping._flat import as_clip_rule, check_sensitivity
from dpoptax.clipping._state import AnyClipRule
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import Relation
from dpoptax.samplers import Sampler
from dpoptax.schedules import ScalarOrSchedule, validated
from dpoptax.transforms import privatize
from dpoptax.transforms._release import check_release

FORMAT = "dpoptax plan 1"


@attrs.frozen(init=False)
class Plan:
    """A private run, fixed before it starts.

    Attributes:
        sampler: draws the examples of each step. Where the padded size of random batches was left
            to the sampler, the plan takes the smallest size that costs at most 0.1 % of epsilon. It
            is this sampler that a loop of your own must draw from, and that a ledger of your own
            must have, and not the one that you passed.
        clip: the clip rule. A number `c` or a schedule is the short form of
            `dpoptax.clipping.FlatClip(c)`.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound. An
            Optax schedule, here or as the clip bound, is evaluated at every planned step and kept
            as a `dpoptax.schedules.Schedule`. For a clip rule with state it is that of the whole
            step.
        num_steps: how many steps may run. The constructor also takes `epochs` in its place: how
            often each example takes part on average.
        delta: of the guarantee; strictly between 0 and 1, and well below 1 / num_examples.
        mechanism: how the noise is drawn, one of `dpoptax.mechanisms`. Only `Correlated` changes
            epsilon. It covers a fixed number of steps, and needs a sampler that it is proven for.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Warns:
        UserWarning: delta is above 1 / num_examples.

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
        >>> plan.replace(num_steps=100).epsilon() < plan.epsilon()
        True
    """

    sampler: Sampler
    clip: AnyClipRule
    noise_multiplier: ScalarOrSchedule
    num_steps: int
    delta: float
    mechanism: AnyMechanism

    # Written out, because two arguments may be Optax schedules, which need num_steps to become
    # the values that the fields hold.
    @answer_foreign_names
    def __init__(
        self,
        *,
        sampler: Sampler,
        clip: AnyClipRule | ScalarOrSchedule | optax.Schedule,
        noise_multiplier: ScalarOrSchedule | optax.Schedule,
        num_steps: int | None = None,
        epochs: float | None = None,
        delta: float,
        mechanism: AnyMechanism = Gaussian(),
    ) -> None:
        """Validates the arguments; see the class."""
        _arguments.check_sampler(sampler)
        _arguments.check_mechanism(mechanism)
        num_steps = num_steps_of(sampler, epochs, num_steps, at_least=0)
        _arguments.check_num_steps(num_steps, mechanism)
        rule = as_clip_rule(_arguments.tabulated(clip, num_steps))
        check_sensitivity(rule, sampler.relation)
        noise = validated(
            "noise_multiplier",
            _arguments.tabulated(noise_multiplier, num_steps),
            _validate.non_negative,
        )
        # Fail now, not after the data is loaded: some mechanisms refuse a clip or a noise.
        check_release(rule, noise, mechanism)
        _arguments.check_accounted(sampler, rule, noise, num_steps, mechanism)
        delta = _validate.open_unit("delta", delta)
        _validate.warn_of_large_delta(delta, sampler.num_examples, sampler.unit)
        self.__attrs_init__(
            sampler=with_smallest_batch(sampler, noise, delta),
            clip=rule,
            noise_multiplier=noise,
            num_steps=num_steps,
            delta=delta,
            mechanism=mechanism,
        )

    @classmethod
    @answer_foreign_names
    def calibrate(
        cls,
        *,
        sampler: Sampler | None = None,
        num_examples: int | None = None,
        expected_batch_size: float | None = None,
        clip: AnyClipRule | ScalarOrSchedule | optax.Schedule,
        epochs: float | None = None,
        num_steps: int | None = None,
        epsilon: float | None = None,
        risk: AttackRisk | None = None,
        delta: float,
        mechanism: AnyMechanism = Gaussian(),
    ) -> "Plan":
        """Returns the plan with the least noise that costs at most `epsilon`.

        The budget holds under the sampler's own neighbouring relation.

        Args:
            sampler: any sampler, also one of your own; or give the next two arguments
            num_examples: how many examples there are, and
            expected_batch_size: the mean batch size, for `samplers.Poisson(num_examples,
                expected_batch_size)`.
            clip: a clip rule, also one of your own, or the bound on the norm of one example's
                gradient.
            epochs: how often each example takes part on average; or
            num_steps: how many steps to plan. Give one of the two.
            epsilon: the budget; or
            risk: a limit on an attack, such as `accounting.Advantage(0.1)`. Give one of the two.
            delta: strictly between 0 and 1, and well below 1 / num_examples.
            mechanism: how the noise is drawn. Only `Correlated` changes the noise multiplier.

        Returns:
            A plan with `plan.epsilon() <= epsilon`, or within the limit on the risk.

        Raises:
            TypeError: a wrong type; or of two alternatives, both or none were given.
            ValueError: a number is out of range.

        Warns:
            UserWarning: delta is above 1 / num_examples.

        Example:
            >>> plan = Plan.calibrate(
            ...     num_examples=1000, expected_batch_size=100, clip=1.0, epochs=5,
            ...     epsilon=2.0, delta=1e-5,
            ... )
            >>> plan.num_steps, plan.epsilon() <= 2.0
            (50, True)
        """
        sampler = _arguments.one_sampler(sampler, num_examples, expected_batch_size)
        steps = num_steps_of(sampler, epochs, num_steps)
        sampler, found = calibrate_with_smallest_batch(
            sampler, steps, epsilon, delta, mechanism=mechanism, risk=risk
        )
        return cls(
            sampler=sampler,
            clip=clip,
            noise_multiplier=found.noise_multiplier,
            num_steps=steps,
            delta=delta,
            mechanism=mechanism,
        )

    def replace(self, **changes: Any) -> "Plan":
        """Returns this plan with some arguments changed, all of them validated again."""
        kept = {name: getattr(self, name) for name in _serialize.fields(Plan)}
        if "epochs" in changes:
            del kept["num_steps"]
        return Plan(**(kept | changes))

    def privatize(self, key: PRNGKeyArray) -> optax.GradientTransformation:
        """Returns the transformation of this plan. Use `key` for its noise and nothing else."""
        return privatize(
            self.clip,
            self.noise_multiplier,
            expected_batch_size=self.sampler.expected_batch_size,
            key=key,
            mechanism=self.mechanism,
        )

    def event(
        self, num_steps: int | None = None, relation: Relation | None = None
    ) -> dp_accounting.DpEvent:
        """Returns dp-accounting's event for the first `num_steps` steps, all by default.

        `relation=None` means the sampler's own relation, here and below.
        """
        if relation is not None:
            check_sensitivity(self.clip, relation)
        steps = self._steps(num_steps)
        return run_event(self.sampler, self.noise_multiplier, steps, relation, self.mechanism)

    def privacy_loss(
        self, num_steps: int | None = None, relation: Relation | None = None
    ) -> PrivacyLoss:
        """Returns the privacy loss of the first `num_steps` steps, to read many guarantees off."""
        relation = resolve_relation(relation, self.sampler.relation)
        event = self.event(num_steps, relation)
        return event_privacy_loss(event, delta=self.delta, relation=relation)

    def epsilon(
        self,
        num_steps: int | None = None,
        delta: float | None = None,
        relation: Relation | None = None,
        group_size: int = 1,
    ) -> float:
        """Returns the epsilon of the first `num_steps` steps, all by default; inf without noise."""
        if relation is not None:
            check_sensitivity(self.clip, relation)
        return accounting.epsilon(
            sampler=self.sampler,
            noise_multiplier=self.noise_multiplier,
            num_steps=self._steps(num_steps),
            delta=self.delta if delta is None else delta,
            relation=relation,
            group_size=group_size,
            mechanism=self.mechanism,
        )

    @property
    def gradient_noise_multiplier(self) -> ScalarOrSchedule:
        """The noise multiplier of the gradients: more than that of a step that also counts."""
        if not isinstance(self.clip, StatefulClipRule):
            return self.noise_multiplier
        return split_noise(self.noise_multiplier, self.clip.count_noise).gradients

    def ledger(self) -> accounting.Ledger:
        """Returns an empty ledger for a run of this plan."""
        return accounting.Ledger(
            self.sampler, self.clip, delta=self.delta, mechanism=self.mechanism
        )

    def to_json(self) -> str:
        """Returns this plan as JSON, which `from_json` reads back. It holds public numbers only.

        A sampler, clip rule or mechanism of your own is written as its module, class and fields. Of
        `UserPoisson` the number of users is written, and not the user of every example.

        Raises:
            TypeError: a class of your own has no fields, or fields that hold more than numbers,
                strings, and tuples and dicts of them.
        """
        content = {name: _serialize.encode(getattr(self, name)) for name in _serialize.fields(Plan)}
        return _serialize.write_document(FORMAT, content)

    @classmethod
    def from_json(cls, text: str, *, classes: Iterable[type] = ()) -> "Plan":
        """Returns the plan that `to_json` wrote.

        A `UserPoisson` that was read draws users and is accounted, but cannot arrange data: for
        that, make it again with the user of every example.

        Args:
            text: the JSON.
            classes: samplers, clip rules and mechanisms of your own that the plan has. Nothing is
                imported because the text names it.

        Returns:
            A plan that is equal to the one that was written.

        Raises:
            ValueError: the text is not such a plan. Nothing is guessed and nothing is ignored.
        """
        content = _serialize.read_document(text, FORMAT, _serialize.fields(Plan))
        return cls(**_arguments.decoded(content, tuple(classes)))

    def _steps(self, num_steps: int | None) -> int:
        if num_steps is None:
            return self.num_steps
        return _validate.count("num_steps", num_steps, at_least=0)
