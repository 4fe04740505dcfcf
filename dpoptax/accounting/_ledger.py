"""Ledger: counts private releases before they happen, and says what they have cost so far."""

import math
from typing import Any

import dp_accounting

from dpoptax import _serialize, _validate
from dpoptax.accounting._charged_steps import ChargedSteps
from dpoptax.accounting._correlated import (
    check_clip,
    check_horizon,
    check_sampler,
    constant_noise,
    strategy_of,
)
from dpoptax.accounting._epsilon import event_epsilon, resolve_relation, run_event
from dpoptax.accounting._event_json import decode_event, encode_event
from dpoptax.clipping._flat import as_clip_rule, check_sensitivity
from dpoptax.clipping._state import AnyClipRule
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import Relation
from dpoptax.samplers import Sampler
from dpoptax.schedules import ScalarOrSchedule, Schedule, as_schedule, validated

FORMAT = "dpoptax ledger 2"
# The bound of `epsilon_bound` is evaluated at 16 steps and then at every 5 % more: a run of 10,000
# steps evaluates 132 epsilons, and the bound is at most 5 % of the steps ahead.
FIRST_STEPS, STRIDE = 16, 0.05


class Ledger:
    """The privacy cost of everything that a run has released.

    Charge a step before its update leaves the program. A step that is charged and then lost costs a
    little too much. A step that is released and not charged breaks the guarantee.

    The noise may change from step to step, if the changes were fixed before the run. If the noise
    depends on earlier releases, use `RdpFilter`.

    The n-th charged step is the sampler's n-th step, under one key. This matters for samplers whose
    steps are accounted together, such as `Shuffled` or `PoissonSchedule`. When a run starts over,
    call `restart`.

    Correlated noise costs more than independent noise under some samplers, and has no guarantee
    under others. The ledger of such a run needs its mechanism: `plan.ledger()` passes it.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> ledger = Ledger(Poisson(60_000, 128), clip=1.0, delta=1e-5)
        >>> for _ in range(100):
        ...     ledger.charge(noise_multiplier=1.1)  # then compute and release the update
        >>> ledger.num_steps, ledger.epsilon() <= ledger.epsilon_bound() < 1
        (100, True)
    """

    def __init__(
        self,
        sampler: Sampler,
        clip: AnyClipRule | ScalarOrSchedule,
        *,
        delta: float,
        mechanism: AnyMechanism = Gaussian(),
    ) -> None:
        """Creates an empty ledger.

        Args:
            sampler: draws the examples of each step.
            clip: the clip rule. It does not change the cost, but is kept so that a saved ledger is
                not continued with another rule.
            delta: the delta at which epsilon is computed.
            mechanism: how the noise is drawn. Only `mechanisms.Correlated` changes the cost.

        Raises:
            ValueError: delta is out of range; or the noise is correlated, and nothing is proven
                about this sampler or clip rule.
        """
        self.sampler = sampler
        self.clip: AnyClipRule = as_clip_rule(clip)
        check_sensitivity(self.clip, sampler.relation)
        self.mechanism = mechanism
        self._strategy = strategy_of(mechanism)
        if self._strategy is not None:
            check_clip(mechanism, self.clip)
            check_sampler(self._strategy, sampler)
        self.delta: float = _validate.open_unit("delta", delta)
        self._steps = ChargedSteps()
        self._others: list[tuple[dp_accounting.DpEvent, int]] = []
        self._known_epsilons: dict[Any, float] = {}

    def __copy__(self) -> "Ledger":
        """Returns a ledger of the same charges. Charges to one do not count in the other."""
        copied = Ledger(self.sampler, self.clip, delta=self.delta, mechanism=self.mechanism)
        copied._steps = ChargedSteps(self._steps.segments)
        copied._others = list(self._others)
        return copied

    @property
    def noise_multiplier(self) -> ScalarOrSchedule:
        """The noise multiplier of the charged steps; 0 if there are none."""
        return self._steps.noise_multiplier

    @property
    def runs(self) -> list[tuple[ScalarOrSchedule, int]]:
        """The noise multiplier and the number of steps from each restart to the next."""
        return self._steps.runs

    @property
    def num_steps(self) -> int:
        """How many steps were charged."""
        return self._steps.num_steps

    def charge(self, noise_multiplier: ScalarOrSchedule, num_steps: int | None = None) -> None:
        """Counts steps. Call it before their updates are released.

        Args:
            noise_multiplier: of these steps. A schedule is read from its first step on, and needs
                `num_steps`.
            num_steps: how many; one by default.

        Raises:
            TypeError: a count is not whole, or a schedule comes without `num_steps`.
            ValueError: the noise multiplier is negative; or the noise is correlated, and its
                multiplier changes, or the run exceeds the steps of the strategy.
        """
        if num_steps is None and isinstance(noise_multiplier, Schedule):
            raise TypeError(
                "a schedule is read from its first step on. Charge the noise multiplier of this "
                "step, schedule(step), or pass num_steps to charge the first num_steps of them."
            )
        num_steps = 1 if num_steps is None else num_steps
        num_steps = _validate.count("num_steps", num_steps, at_least=0)
        noise_multiplier = validated("noise_multiplier", noise_multiplier, _validate.non_negative)
        charged = ChargedSteps(self._steps.segments)
        for value, first, last in as_schedule(noise_multiplier).pieces(num_steps):
            charged.add(value, last - first)
        if self._strategy is not None and charged.num_last:
            noise, total = charged.runs[-1]
            constant_noise(noise, total)
            check_horizon(self._strategy, total)
        self._steps = charged

    def restart(self) -> None:
        """Says that the sampler starts over: at its first step, under a new key.

        What was charged stays charged. Correlated noise starts over too, with new draws. A run
        that resumes from a checkpoint, together with its sampler's state, does not restart; steps
        that it repeats identically are the same releases and are charged once.
        """
        self._steps.restart()

    def charge_event(self, event: Any, count: int = 1) -> None:
        """Counts another release on the same data: a histogram, a quantile, an earlier run.

        Args:
            event: an event of dp-accounting. A noise multiplier in it is relative to how far one
                example moves that release, under the relation of this ledger's sampler.
            count: how often.

        Raises:
            TypeError: not an event, or a count that is not whole.
        """
        if not isinstance(event, dp_accounting.DpEvent):
            raise TypeError(
                f"expected a dp_accounting.DpEvent; got {_validate.described(event)}. "
                "Pass for example dp_accounting.GaussianDpEvent(noise_multiplier)."
            )
        self._others.append((event, _validate.count("count", count)))

    def event(self, relation: Relation | None = None) -> dp_accounting.DpEvent:
        """Returns dp-accounting's event for everything that was charged.

        `relation=None` means the sampler's own relation, here and below.
        """
        return self._event_of(self._steps, relation)

    @property
    def num_other_releases(self) -> int:
        """How many releases were charged by `charge_event`."""
        return sum(count for _, count in self._others)

    def epsilon(self, delta: float | None = None, relation: Relation | None = None) -> float:
        """Returns the epsilon of everything that was charged; computed once and remembered."""
        return self._epsilon_of(self._steps, self.delta if delta is None else delta, relation)

    def epsilon_bound(self) -> float:
        """Returns an upper bound of `epsilon()` that is cheap enough to compute at every step.

        It is the epsilon of up to 5 % more steps, so that only a few different ones are computed.
        """
        steps = self._steps.num_last
        if steps == 0:
            return self.epsilon()
        if steps <= FIRST_STEPS:
            return self._epsilon_of(self._steps, self.delta, None)
        # The next point of the grid 16 * 1.05**n.
        power = math.ceil(math.log(steps / FIRST_STEPS) / math.log1p(STRIDE) - 1e-9)
        more = max(math.ceil(FIRST_STEPS * (1 + STRIDE) ** power) - steps, 0)
        if self._strategy is not None:
            more = min(more, self._strategy.num_steps - steps)
        return self._epsilon_of(self._steps.extended(more), self.delta, None)

    def to_json(self) -> str:
        """Returns the ledger as JSON, for a checkpoint. It holds nothing private."""
        content = {
            **self._identity(),
            "delta": self.delta,
            "segments": self._steps.segments,
            "others": [[encode_event(event), count] for event, count in self._others],
        }
        return _serialize.write_document(FORMAT, content)

    @classmethod
    def from_json(
        cls,
        text: str,
        *,
        sampler: Sampler,
        clip: AnyClipRule | ScalarOrSchedule,
        mechanism: AnyMechanism = Gaussian(),
    ) -> "Ledger":
        """Returns the ledger that `to_json` wrote, to continue the same run.

        Args:
            text: the JSON.
            sampler: the sampler of the run.
            clip: the clip rule of the run.
            mechanism: how the noise of the run is drawn.

        Returns:
            The ledger.

        Raises:
            ValueError: the text is not a ledger, or one of another sampler, clip rule or strategy
                of correlated noise.
        """
        names = {"sampler", "clip", "strategy", "delta", "segments", "others"}
        content = _serialize.read_document(text, FORMAT, names)
        ledger = cls(sampler, clip, delta=content["delta"], mechanism=mechanism)
        # The cost of steps depends on the sampler; a run under another one is another run.
        for name, now in ledger._identity().items():
            if content[name] != now:
                raise ValueError(
                    f"this ledger has the {name} {_serialize.summary(content[name])}, but the run "
                    f"that would continue it has {_other_summary(now, content[name])}. Continue "
                    "with the first. Or start a new ledger and charge the old run to it: "
                    "new.charge_event(old.event(new.sampler.relation))."
                )
        for segment in content["segments"]:
            ledger.restart()  # does nothing before the first segment
            for noise, count in segment:
                ledger.charge(noise, count)
        for event, count in content["others"]:
            ledger.charge_event(decode_event(event), count)
        return ledger

    def _identity(self) -> dict[str, Any]:
        return {
            "sampler": _serialize.encode_or_describe(self.sampler),
            "clip": _serialize.encode_or_describe(self.clip),
            # All mechanisms of independent noise cost the same.
            "strategy": _serialize.encode_or_describe(self._strategy)
            if self._strategy is not None
            else {"kind": "IndependentNoise"},
        }

    def _epsilon_of(self, steps: ChargedSteps, delta: float, relation: Relation | None) -> float:
        """The epsilon of these steps and all other releases, computed once."""
        parsed = resolve_relation(relation, self.sampler.relation)
        # Other releases are only ever added, so that their number identifies them.
        key = (steps.key(), len(self._others), delta, parsed)
        if key not in self._known_epsilons:
            event = self._event_of(steps, parsed)
            self._known_epsilons[key] = event_epsilon(event, delta=delta, relation=parsed)
        return self._known_epsilons[key]

    def _event_of(self, steps: ChargedSteps, relation: Relation | None) -> dp_accounting.DpEvent:
        parsed = resolve_relation(relation, self.sampler.relation)
        check_sensitivity(self.clip, parsed)
        events = [dp_accounting.SelfComposedDpEvent(event, count) for event, count in self._others]
        events += [
            run_event(self.sampler, noise, num_steps, parsed, self.mechanism)
            for noise, num_steps in steps.runs
        ]
        return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)


def _other_summary(record: Any, other: Any) -> str:
    """Returns the summary of a record, and more where that of a different one is the same."""
    summary = _serialize.summary(record)
    same = summary == _serialize.summary(other)
    return f"{summary} with other numbers" if same else summary
