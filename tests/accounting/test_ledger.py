"""Ledger: charges are never less than the true cost, and belong to one run."""

import math

import dp_accounting
import numpy as np
import pytest

from dpoptax import Plan, Report, clipping
from dpoptax.accounting import BudgetSpentError, Ledger, RdpFilter, epsilon, event_epsilon
from dpoptax.samplers import BallsInBins, FixedSize, Poisson, PoissonSchedule, Shuffled, UserPoisson
from dpoptax.schedules import Schedule

SAMPLER = Poisson(1000, 20)


def ledger(**changes):
    return Ledger(**({"sampler": SAMPLER, "clip": 1.0, "delta": 1e-5} | changes))


def test_steps_charged_one_by_one_cost_what_they_cost_together():
    book = ledger()
    assert book.epsilon() == book.epsilon_bound() == 0.0
    for _ in range(30):
        book.charge(1.1)
    book.charge(1.1, 20)
    book.charge(2.0, 50)
    book.charge(Schedule((2.0, 3.0), (10, 5)), 20)
    assert book.num_steps == 120
    noise = Schedule((1.1, 2.0, 3.0), (50, 60, 10))
    run = {"sampler": SAMPLER, "num_steps": 120, "delta": 1e-5}
    assert book.epsilon() == epsilon(noise_multiplier=noise, **run)
    assert book.epsilon(1e-3) < book.epsilon() < book.epsilon(relation="replace_one")


def test_a_schedule_is_charged_for_a_number_of_steps():
    """Charged step by step, it would be read at its first value each time."""
    with pytest.raises(TypeError, match="a schedule is read from its first step on"):
        ledger().charge(Schedule((10.0, 0.6), (10, 990)))


RESTARTED = {
    "stages": (PoissonSchedule([(Poisson(1000, 500), 10), (Poisson(1000, 10), 10**6)]), 10),
    "half a pass": (Shuffled(100, 10), 5),
}


@pytest.mark.parametrize(("sampler", "steps"), RESTARTED.values(), ids=RESTARTED)
def test_a_restart_starts_at_the_first_step_of_the_sampler(sampler, steps):
    book = ledger(sampler=sampler)
    for _ in range(4):
        book.charge(2.0, steps)
        book = Ledger.from_json(book.to_json(), sampler=sampler, clip=1.0)
    continued = book.epsilon()
    book = ledger(sampler=sampler)
    for _ in range(4):
        book.restart()
        book.charge(2.0, steps)
        book = Ledger.from_json(book.to_json(), sampler=sampler, clip=1.0)
    assert book.num_steps == 4 * steps
    assert book.noise_multiplier == 2.0 or set(book.noise_multiplier.values) == {2.0}
    single = sampler.event(2.0, steps)
    expected = event_epsilon(
        dp_accounting.SelfComposedDpEvent(single, 4), delta=1e-5, relation=sampler.relation
    )
    assert book.epsilon() == pytest.approx(expected, rel=1e-9)
    assert book.epsilon_bound() >= book.epsilon() > 1.2 * continued
    assert book.runs == [(2.0, steps)] * 4


def test_half_a_pass_before_a_restart_counts_as_a_pass():
    plan = Plan(sampler=Poisson(100, 10), clip=1.0, noise_multiplier=2.0, num_steps=20, delta=1e-5)
    continued, restarted = plan.ledger(), plan.ledger()
    for book in (continued, restarted):
        for _ in range(4):
            book.charge(2.0, 5)
            if book is restarted:
                book.restart()
    run = {"steps_done": 20, "steps_planned": 20, "noise_multiplier": 2.0}
    shown = [
        Report.from_ledger(book, mechanism=plan.mechanism, **run).epsilon_unamplified
        for book in (continued, restarted)
    ]
    expected = [
        event_epsilon(dp_accounting.GaussianDpEvent(2 / n**0.5), delta=1e-5) for n in (2, 4)
    ]
    assert shown == pytest.approx(expected, rel=1e-3)


def test_the_cheap_bound_is_near_and_never_below(monkeypatch):
    book, evaluated, shown = ledger(), [], []
    real = event_epsilon

    def counting(*args, **options):
        evaluated.append(1)
        return real(*args, **options)

    monkeypatch.setattr("dpoptax.accounting._ledger.event_epsilon", counting)
    for _ in range(400):
        book.charge(1.1)
        shown.append(book.epsilon_bound())
    assert len(evaluated) < 90
    assert np.all(np.diff(shown) >= 0)
    for step in (1, 16, 17, 100, 399, 400):
        exact = epsilon(sampler=SAMPLER, noise_multiplier=1.1, num_steps=step, delta=1e-5)
        assert exact <= shown[step - 1] <= 1.05 * exact


def test_other_releases_are_counted_too():
    book = ledger()
    book.charge(1.5, 100)
    before = book.epsilon()
    histogram = dp_accounting.GaussianDpEvent(20.0)
    book.charge_event(histogram, 3)
    both = dp_accounting.ComposedDpEvent(
        [SAMPLER.event(1.5, 100), dp_accounting.SelfComposedDpEvent(histogram, 3)]
    )
    assert before < book.epsilon() == event_epsilon(both, delta=1e-5)
    assert book.epsilon_bound() >= book.epsilon()


def test_a_step_without_noise_ends_all_privacy():
    book = ledger()
    book.charge(1.0, 10)
    book.charge(0.0)
    assert book.epsilon() == book.epsilon_bound() == math.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [SAMPLER, FixedSize(1000, 20), BallsInBins(1000, 50), UserPoisson(range(100), 5, 1)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_ledger_is_read_back_for_the_same_run(sampler):
    book = ledger(sampler=sampler, clip=clipping.FlatClip(0.7))
    book.charge(1.5, 100)
    book.charge(1.25)
    book.charge_event(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(9.0)))
    book.charge_event(
        dp_accounting.ComposedDpEvent([dp_accounting.LaplaceDpEvent(30.0)] * 2), np.int64(2)
    )
    again = Ledger.from_json(book.to_json(), sampler=sampler, clip=0.7)
    assert again.epsilon() == book.epsilon()
    assert again.num_steps == 101
    assert again.to_json() == book.to_json()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"sampler": Poisson(1000, 21)}, "sampler"),
        ({"sampler": Poisson(1001, 20)}, "sampler"),
        ({"sampler": FixedSize(1000, 20)}, "sampler"),
        ({"sampler": Shuffled(1000, 20)}, "sampler"),
        ({"clip": 1.5}, "clip"),
        ({"clip": Schedule((1.0, 2.0), (5, 5))}, "clip"),
    ],
)
def test_a_ledger_is_not_continued_with_another_sampler_or_clip(changes, name):
    book = ledger()
    book.charge(1.5, 100)
    match = rf"this ledger has the {name}.*the run that would continue it has.*charge_event"
    with pytest.raises(ValueError, match=match):
        Ledger.from_json(book.to_json(), **({"sampler": SAMPLER, "clip": 1.0} | changes))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "dpoptax plan 1"}'])
def test_what_is_no_ledger_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|must be a JSON object"):
        Ledger.from_json(text, sampler=SAMPLER, clip=1.0)


def test_a_plan_opens_its_ledger():
    plan = Plan(sampler=SAMPLER, clip=2.0, noise_multiplier=1.5, num_steps=9, delta=1e-6)
    book = plan.ledger()
    book.charge(plan.noise_multiplier, 9)
    assert book.epsilon() == plan.epsilon()
    assert Ledger.from_json(book.to_json(), sampler=plan.sampler, clip=plan.clip).num_steps == 9


def test_the_filter_admits_what_fits_and_nothing_beyond():
    budget = RdpFilter(epsilon=1.0, delta=1e-5)
    for noise in (10.0, 20.0, 15.0):  # chosen after looking, say
        budget.charge(SAMPLER.event(noise, 50))
    spent = budget.spent()
    together = dp_accounting.ComposedDpEvent([SAMPLER.event(n, 50) for n in (10.0, 20.0, 15.0)])
    assert event_epsilon(together, delta=1e-5) < spent < 1.0
    too_much = dp_accounting.GaussianDpEvent(2.0)
    assert not budget.admits(too_much)
    with pytest.raises(BudgetSpentError, match=r"would exceed epsilon = 1 .*is spent"):
        budget.charge(too_much)
    assert budget.spent() == spent
    while budget.admits(dp_accounting.GaussianDpEvent(20.0)):
        budget.charge(dp_accounting.GaussianDpEvent(20.0))
    assert 0.8 < budget.spent() <= 1.0


def test_the_filter_counts_a_full_batch_as_twice_the_clip():
    full, poisson = RdpFilter(epsilon=9.0, delta=1e-5), RdpFilter(epsilon=9.0, delta=1e-5)
    full.charge(FixedSize(1000, 20).event(4.0, 100))
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    poisson.charge(
        dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(0.02, gaussian), 100)
    )
    assert full.spent() == pytest.approx(poisson.spent())


def test_the_filter_counts_bins_that_may_overflow_as_full():
    bins, gaussian = RdpFilter(epsilon=9.0, delta=1e-5), RdpFilter(epsilon=9.0, delta=1e-5)
    bins.charge(BallsInBins(100, 2, max_batch_size=55).event(4.0, 4))
    gaussian.charge(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(2.0), 2))
    assert bins.spent() == pytest.approx(gaussian.spent())


def test_a_ledger_of_bins_is_charged_to_another_and_read_back():
    bins = BallsInBins(100, 2, max_batch_size=55)
    old = Ledger(bins, 1.0, delta=1e-5)
    old.charge(4.0, 4)
    new = ledger()
    new.charge_event(old.event())
    again = Ledger.from_json(new.to_json(), sampler=SAMPLER, clip=new.clip)
    assert again.epsilon() == new.epsilon() > 0


def test_the_filter_refuses_what_it_cannot_bound():
    with pytest.raises(ValueError, match=r"got replace_one"):
        RdpFilter(epsilon=1.0, delta=1e-5, relation="replace_one")
    with pytest.raises(ValueError, match="order must be above 1"):
        RdpFilter(epsilon=1.0, delta=1e-5, order=1.0)
    budget = RdpFilter(epsilon=1.0, delta=1e-5)
    assert not budget.admits(dp_accounting.NonPrivateDpEvent())
    with pytest.raises(dp_accounting.UnsupportedEventError):
        budget.charge(dp_accounting.UnsupportedDpEvent())


def test_an_infinite_noise_multiplier_is_not_free():
    ledger = Ledger(Shuffled(100, 10), 1.0, delta=1e-5)
    with pytest.raises(ValueError, match="noise_multiplier must be zero or more, and finite"):
        ledger.charge(Schedule((math.inf,), (10,)), 10)
