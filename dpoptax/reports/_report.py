"""Report: the privacy statement of a plan or of a run, as numbers, text, JSON and a figure."""

import importlib.metadata
import math
import pathlib
from typing import Any

import attrs
import numpy as np
import scipy.special

from dpoptax import _serialize, _validate
from dpoptax._plan import Plan
from dpoptax.accounting import Ledger, RandomRuns, trade_off
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.relations import parse_relation
from dpoptax.reports import _figure, _text
from dpoptax.reports._attack import Attack, summary_and_rates
from dpoptax.reports._best_attacker import best_attacker
from dpoptax.reports._clip import clip_and_gradient_noise
from dpoptax.reports._correlated import assumptions_of, check_same_noise, correlation
from dpoptax.reports._costs import Costs
from dpoptax.reports._released import released
from dpoptax.reports._round import round_up
from dpoptax.reports._values import ReportValues
from dpoptax.schedules import ScalarOrSchedule

GROUP_SIZES = (2, 10)
# The figure starts here: smaller rates depend on smaller deltas than the report is about.
SMALLEST_RATE_DRAWN = 1e-5


@attrs.frozen(kw_only=True)
class Report(ReportValues):
    """The privacy statement of a plan or of a run.

    Print it, or write it with `to_json()` or `save_figure(path)`.

    Attributes:
        unit: what is protected, an example or a user.
        relation: which data sets are neighbours.
        num_units: how many units there are; a noisy number if `noisy_num_units`.
        released: what left the program.
        sampler: class and settings of the sampler.
        clip: class and settings of the clip rule.
        mechanism: class and settings of the mechanism.
        correlation: for correlated noise, its strategy, for how many steps it was made, and in
            which steps a unit may take part; else None.
        noise_multiplier: a number or a schedule.
        gradient_noise_multiplier: that of the gradients alone, if each step also releases a count
            for its clip rule; else None.
        steps_planned: how many steps the plan has.
        steps_done: how many of them were done.
        steps_lost: how many more were charged: they may have been released before a crash, and
            could not be repeated identically.
        covers_all_steps: whether the numbers below are those of all planned steps, although fewer
            were done: something that was released may have decided when the run ended.
        delta: of the guarantee.
        epsilon: of the guarantee; inf for a run without noise.
        epsilon_of_steps_done: epsilon of the steps that were charged. With `covers_all_steps` it is
            the guarantee only if nothing that was released decided when the run ended.
        epsilon_of_one_run: epsilon of this run alone. It differs from `epsilon` in a search only.
        runs: class and settings of the number of runs, if this is the best run of a search.
        epsilon_by_delta: epsilon at delta and at two others.
        epsilon_replace_one: epsilon under replace_one; inf where none is known.
        epsilon_by_group_size: epsilon for groups of units.
        epsilon_unamplified: epsilon without sampling amplification, each unit used once per pass
            at a publicly known step.
        advantage: the most by which an attacker's true positive rate exceeds the false positive
            rate.
        true_positive_rate: the largest one, by false positive rate.
        posterior_belief: the largest belief after the release, by belief before it; except with
            probability delta.
        reconstruction: the largest probability that an attacker reconstructs one unit, or a part of
            it, by that of a blind guess.
        mu: the run is at least as private as mu-GDP.
        accountant: how epsilon was computed, with versions.
        prng: where the random numbers came from.
        assumptions: the conditions that the statement depends on.
        loss: the privacy loss, for the figure.
        attack: how far an attack on the run got; None without an audit. Not private.
        attack_rates: the rates of this attack, for the figure.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(1000, 20),
        ...     clip=1.0,
        ...     noise_multiplier=2.0,
        ...     num_steps=50,
        ...     delta=1e-4,
        ... )
        >>> report = Report.from_plan(plan)
        >>> report.epsilon == plan.epsilon()
        True

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(1000, 50), clip=1.0, noise_multiplier=2.0,
        ...     num_steps=10, delta=1e-5)
        >>> report = dpoptax.Report.from_plan(plan)
        >>> report.unit, report.relation, report.epsilon == plan.epsilon()
        ('example', 'add_or_remove_one', True)
    """

    @classmethod
    def from_plan(
        cls, plan: Plan, num_steps: int | None = None, runs: RandomRuns | None = None
    ) -> "Report":
        """Returns the report of the first `num_steps` steps of a plan, all by default.

        With `runs` it is the report of a search in which no run costs more than this plan. For
        candidates that cost more, see `dpoptax.accounting.tuned`.
        """
        if num_steps is None:
            num_steps = plan.num_steps
        num_steps = _validate.count("num_steps", num_steps, at_least=0)
        ledger = plan.ledger()
        ledger.charge(plan.noise_multiplier, num_steps)
        return cls.from_ledger(
            ledger,
            steps_done=num_steps,
            steps_planned=plan.num_steps,
            noise_multiplier=plan.noise_multiplier,
            mechanism=plan.mechanism,
            prng=_text.NO_PRNG,
            runs=runs,
        )

    @classmethod
    def from_ledger(
        cls,
        ledger: Ledger,
        *,
        steps_done: int,
        steps_planned: int,
        noise_multiplier: ScalarOrSchedule,
        mechanism: AnyMechanism,
        prng: str = _text.UNKNOWN_PRNG,
        all_steps: Ledger | None = None,
        runs: RandomRuns | None = None,
        audit: Attack | None = None,
    ) -> "Report":
        """Returns the report of a run.

        Args:
            ledger: everything that was charged.
            steps_done: how many steps of the plan were done, of those charged.
            steps_planned: how many steps the plan has.
            noise_multiplier: of the plan.
            mechanism: how the noise was drawn.
            prng: where the random numbers came from, in words.
            all_steps: a ledger that also has the steps that were planned and not done. Give it if
                something that was released may have decided when the run ended, for example the
                accuracy of its parameters. The guarantee is then that of all planned steps.
            runs: the distribution of the number of runs, if this is the best run of a search. The
                guarantee is then that of the search, see `dpoptax.accounting.tuned`.
            audit: a `dpoptax.audit.Audit` of the run, for a section on what an attack reached.

        Returns:
            A `Report`.

        Raises:
            ValueError: the noise is correlated in another way than the ledger counted, or the audit
                is of another run.
        """
        check_same_noise(ledger, mechanism)
        attack, attack_rates = summary_and_rates(audit, ledger)
        guarantee = ledger if all_steps is None else all_steps
        sampler, delta = ledger.sampler, ledger.delta
        relation = parse_relation(sampler.relation)
        costs = Costs(guarantee, runs)
        # The trade-off curve is read at smaller deltas than the guarantee.
        loss = costs.loss(delta / 10)
        # Twelve digits, because delta / 10 has rounding errors at the end, and what is shown is
        # rounded up.
        below, above = (float(f"{value:.12g}") for value in (delta / 10, delta * 10))
        epsilons = {value: costs.epsilon(value) for value in (above, delta, below) if value < 1}
        clip, gradients = clip_and_gradient_noise(ledger.clip, noise_multiplier)
        return cls(
            unit=sampler.unit,
            relation=relation.name.lower(),
            num_units=sampler.num_examples,
            released=released(gradients is not None, guarantee.num_other_releases),
            sampler=_serialize.encode_or_describe(sampler),
            clip=clip,
            mechanism=_serialize.encode_or_describe(mechanism),
            correlation=correlation(ledger, steps_planned),
            noise_multiplier=noise_multiplier,
            gradient_noise_multiplier=gradients,
            steps_planned=steps_planned,
            steps_done=steps_done,
            steps_lost=ledger.num_steps - steps_done,
            covers_all_steps=all_steps is not None,
            delta=delta,
            epsilon=epsilons[delta],
            epsilon_of_steps_done=Costs(ledger, runs).epsilon(delta),
            epsilon_of_one_run=guarantee.epsilon(),
            runs=None if runs is None else _serialize.encode(runs),
            epsilon_by_delta=epsilons,
            epsilon_replace_one=costs.replace_one(),
            epsilon_by_group_size={size: costs.of_group(size) for size in GROUP_SIZES},
            epsilon_unamplified=costs.unamplified(),
            **best_attacker(loss, delta),
            accountant=_accountant(),
            prng=prng,
            assumptions=(
                *_text.assumptions(all_steps is not None, runs is not None),
                *assumptions_of(ledger),
                mechanism.caveat,
            ),
            loss=loss,
            attack=attack,
            attack_rates=attack_rates,
        )

    def __str__(self) -> str:
        return _text.as_text(self)

    def in_words(self) -> str:
        """Returns one paragraph for a reader who knows no formula."""
        return _text.in_words(self)

    def to_json(self) -> str:
        """Returns every number as JSON; infinity is the string "inf"."""
        content = {
            name: getattr(self, name)
            for name in _serialize.fields(Report)
            if name not in ("loss", "attack_rates")
        }
        content["attack"] = None if self.attack is None else self.attack.record()
        for name in ("noise_multiplier", "gradient_noise_multiplier"):
            content[name] = _serialize.encode(content[name])
        return _serialize.write_document(
            "dpoptax report 1", {**_finite(content), "in_words": self.in_words()}
        )

    def save_figure(self, path: str | pathlib.Path) -> None:
        """Draws what an attacker can do, and epsilon over delta. The file's ending is the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        _figure.save(pathlib.Path(path), self._attack_curves(), self._guarantee_curve())

    def _attack_curves(self) -> _figure.AttackCurves:
        rates = np.geomspace(SMALLEST_RATE_DRAWN, 1.0, 400)
        bounds = {}
        if math.isfinite(self.mu):
            # The two curves that are known of mu-GDP and of (epsilon, delta)-DP.
            gaussian = scipy.special.ndtr(scipy.special.ndtri(rates) + self.mu)
            one_point = np.minimum(
                math.exp(min(self.epsilon, 700.0)) * rates + self.delta,
                1 - math.exp(-self.epsilon) * (1 - self.delta - rates),
            )
            label = f"what ({round_up(self.epsilon)}, {self.delta:.2g})-DP alone would allow"
            bounds = {f"{self.mu:.2f}-GDP": gaussian, label: np.minimum(one_point, 1.0)}
        found = trade_off.true_positive_rates(self.loss, rates)
        marked, reached = self.true_positive_rate, self.attack_rates
        return _figure.AttackCurves(rates, found, bounds, marked, self.unit, reached)

    def _guarantee_curve(self) -> _figure.GuaranteeCurve:
        smallest, largest = self.delta / 100, min(1000 * self.delta, 0.1)
        last = self.loss.epsilon(smallest)
        epsilons = np.linspace(0.0, last if math.isfinite(last) else 1.0, 500)
        deltas = self.loss.deltas(epsilons)
        shown = deltas <= largest
        steps = f"after {self.steps_done:,} of {self.steps_planned:,} steps"
        if self.covers_all_steps:
            steps = f"of all {self.steps_planned:,} planned steps"
        return _figure.GuaranteeCurve(
            deltas[shown],
            epsilons[shown],
            point=(self.delta, self.epsilon) if math.isfinite(self.epsilon) else None,
            num_units=self.num_units,
            unit=self.unit,
            title=f"The guarantee {steps}",
        )


def _accountant() -> str:
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("dpoptax", "dp-accounting")
    ]
    return f"privacy loss distributions, by {' and '.join(versions)}"


def _finite(value: Any) -> Any:
    """Replaces infinity, which JSON does not have, and keys that are numbers."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
