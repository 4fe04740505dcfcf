"""Steps charged before they are released, one by one, in; what they have cost so far out."""

import json
import math
from typing import Any

import dp_accounting

from dpoptax import _serialize, _validate
from dpoptax.accounting._epsilon import event_epsilon, run_event
from dpoptax.clipping import ClipRule
from dpoptax.clipping._flat import as_clip_rule
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers import Sampler
from dpoptax.schedules import Schedule, Scheduled

FORMAT = "dpoptax ledger 1"
# Between one bound that is evaluated and the next lie this share of the steps, or so many.
STRIDE, FIRST_STEPS = 0.05, 16
NAMES = {"sampler", "clip", "delta", "before", "steps", "others"}
# Noise multipliers, and how many steps in turn had each.
Runs = list[tuple[float, int]]


class Ledger:
    """What a run has spent, whatever happens to it.

    Charge a step before its update leaves the program: one that is charged and then lost costs
    a little too much, one that is released and not charged breaks the guarantee.

    The noise may change from step to step only by a plan made before the run. Where it depends on
    what was released, see `RdpFilter`.

    The n-th step charged is the sampler's n-th, under one key: that is what a law of several steps
    together, as that of `Shuffled` or `PoissonSchedule`, rests on. A run that begins anew says so by
    `restart`.

    Example:
        >>> from dpoptax.samplers import Poisson
        >>> ledger = Ledger(Poisson(60_000, 128), clip=1.0, delta=1e-5)
        >>> for _ in range(100):
        ...     ledger.charge(noise_multiplier=1.1)  # then compute and release the update
        >>> ledger.num_steps, ledger.epsilon() <= ledger.epsilon_bound() < 1
        (100, True)
    """

    def __init__(self, sampler: Sampler, clip: ClipRule | Scheduled, *, delta: float) -> None:
        """Begins a ledger.

        Args:
            sampler: who takes part in each step.
            clip: the rule that clips; kept so that a run cannot go on under another.
            delta: at which epsilon is read.

        Raises:
            ValueError: delta out of range.
        """
        self.sampler = sampler
        self.clip = as_clip_rule(clip)
        self.delta = _validate.open_unit("delta", delta)
        self._runs: Runs = []
        self._before: list[Runs] = []
        self._others: list[tuple[dp_accounting.DpEvent, int]] = []
        self._known: dict[Any, float] = {}

    @property
    def scheduled_noise(self) -> Scheduled:
        """The noise multiplier of the steps that were charged; 0 before the first."""
        return _schedule_of([run for runs in self._all for run in runs])

    @property
    def runs(self) -> list[tuple[Scheduled, int]]:
        """Noise multiplier and number of steps, from each fresh start to the next."""
        return _scheduled(self._all)

    @property
    def num_steps(self) -> int:
        """How many steps were charged."""
        return sum(num_steps for _, num_steps in self.runs)

    def charge(self, noise_multiplier: Scheduled, num_steps: int | None = None) -> None:
        """Counts steps, before their updates are released.

        Args:
            noise_multiplier: of these steps; a schedule is read from its first step on, and so
                needs `num_steps`.
            num_steps: how many; one by default.

        Raises:
            TypeError: a count that is not whole; a schedule without one.
            ValueError: a negative noise multiplier.
        """
        if num_steps is None:
            if isinstance(noise_multiplier, Schedule):
                raise TypeError(
                    "a schedule is read from its first step on. Charge the noise multiplier of "
                    "this step, schedule(step), or pass num_steps for the first so many."
                )
            num_steps = 1
        num_steps = _validate.count("num_steps", num_steps, at_least=0)
        schedule = noise_multiplier
        if not isinstance(schedule, Schedule):
            noise = _validate.non_negative("noise_multiplier", noise_multiplier)
            schedule = Schedule((noise,), (max(num_steps, 1),))
        for value, first, last in schedule.runs(num_steps):
            if self._runs and self._runs[-1][0] == value:
                value, before = self._runs.pop()
                self._runs.append((value, before + last - first))
            else:
                self._runs.append((value, last - first))

    def restart(self) -> None:
        """Says that the sampler begins anew: at its first step, under a new key.

        What was charged stays so. A run that goes on from a checkpoint, sampler and all, does not
        begin anew; steps that it repeats alike are the same releases, and are charged once.
        """
        if self._runs:
            self._before.append(self._runs)
            self._runs = []

    def charge_event(self, event: Any, count: int = 1) -> None:
        """Counts another release on the same data: a histogram, a quantile, an earlier run.

        Args:
            event: of dp-accounting; a noise multiplier in it is relative to what one example moves,
                under the relation of this ledger's sampler.
            count: how often.

        Raises:
            TypeError: not an event, or a count that is not whole.
        """
        if not isinstance(event, dp_accounting.DpEvent):
            raise TypeError(f"expected a dp_accounting.DpEvent; got {event!r}.")
        self._others.append((event, _validate.count("count", count)))

    def event(self, relation: Relation | None = None) -> dp_accounting.DpEvent:
        """Returns dp-accounting's event for everything charged."""
        return self._event(self._all, relation)

    def epsilon(self, delta: float | None = None, relation: Relation | None = None) -> float:
        """Returns what everything charged costs; evaluated when asked for, and once.

        Under the sampler's own relation, if no other is named.
        """
        return self._epsilon(self._all, self.delta if delta is None else delta, relation)

    def epsilon_bound(self) -> float:
        """Returns an upper bound of `epsilon()` that is cheap enough to ask for at every step.

        It is the cost of up to 5 % more steps, so that a run evaluates few distinct ones.
        """
        if not self._runs:
            return self.epsilon()
        *before, (noise, count) = self._runs
        steps = sum(count for _, count in self._runs)
        if steps > FIRST_STEPS:
            power = math.ceil(math.log(steps / FIRST_STEPS) / math.log1p(STRIDE) - 1e-9)
            count += max(math.ceil(FIRST_STEPS * (1 + STRIDE) ** power) - steps, 0)
        return self._epsilon([*self._before, [*before, (noise, count)]], self.delta, None)

    def to_json(self) -> str:
        """Returns the ledger as JSON, for a checkpoint; it holds nothing private."""
        record = {
            "format": FORMAT,
            **self._identity(),
            "delta": self.delta,
            "before": self._before,
            "steps": self._runs,
            "others": [[_serialize.event_record(event), count] for event, count in self._others],
        }
        return json.dumps(record, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, *, sampler: Sampler, clip: ClipRule | Scheduled) -> "Ledger":
        """Returns the ledger that `to_json` wrote, for a run that goes on as it began.

        Args:
            text: the JSON.
            sampler: of the run that goes on.
            clip: of the run that goes on.

        Returns:
            The ledger.

        Raises:
            ValueError: text that is no ledger, or one of another sampler or clip.
        """
        record = _serialize.parse(text, FORMAT, NAMES)
        ledger = cls(sampler, clip, delta=record["delta"])
        for name, now in ledger._identity().items():
            if record[name] != now:
                raise ValueError(
                    f"this ledger is of the {name} {record[name]} and the run that would go on has "
                    f"{now}. Go on with the first; or begin a new ledger and charge the old run to "
                    "it: new.charge_event(old.event(new.sampler.relation))."
                )
        for runs in (*record["before"], record["steps"]):
            ledger.restart()
            for noise, count in runs:
                ledger.charge(noise, count)
        for event, count in record["others"]:
            ledger.charge_event(_serialize.event_of(event), count)
        return ledger

    def _identity(self) -> dict[str, Any]:
        return {
            "sampler": _serialize.sampler_identity(self.sampler),
            "clip": _serialize.clip_identity(self.clip),
        }

    @property
    def _all(self) -> list[Runs]:
        return [*self._before, self._runs]

    def _epsilon(self, all_runs: list[Runs], delta: float, relation: Relation | None) -> float:
        """What these steps and all other releases cost; what was asked before is remembered."""
        parsed = parse_relation(relation or self.sampler.relation)
        key = (tuple(map(tuple, all_runs)), len(self._others), delta, parsed)
        if key not in self._known:
            event = self._event(all_runs, parsed)
            self._known[key] = event_epsilon(event, delta=delta, relation=parsed)
        return self._known[key]

    def _event(self, all_runs: list[Runs], relation: Relation | None) -> dp_accounting.DpEvent:
        parsed = parse_relation(relation or self.sampler.relation)
        events = [dp_accounting.SelfComposedDpEvent(event, count) for event, count in self._others]
        events += [
            run_event(self.sampler, noise, num_steps, parsed)
            for noise, num_steps in _scheduled(all_runs)
        ]
        return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)


def _scheduled(all_runs: list[Runs]) -> list[tuple[Scheduled, int]]:
    """The noise multiplier and the number of steps of each run that has any."""
    return [(_schedule_of(runs), sum(count for _, count in runs)) for runs in all_runs if runs]


def _schedule_of(runs: Runs) -> Scheduled:
    """The noise multiplier of runs of equal steps; 0 for none."""
    if not runs:
        return 0.0
    values, lengths = zip(*runs, strict=True)
    return values[0] if len(values) == 1 else Schedule(values, lengths)
