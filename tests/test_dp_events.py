"""Privacy events of our own, and how steps compose to passes."""

import dp_accounting
import numpy as np
import optax
import pytest

from dpoptax._dp_events import (
    MAX_NOISE_LEVELS,
    KnownBranchDpEvent,
    compose_passes,
    count_passes,
    limited_poisson_event,
)
from dpoptax.accounting import event_epsilon
from dpoptax.schedules import Schedule, tabulate

FALLING = Schedule((2.0, 1.0, 1.5), (3, 4, 2))


def test_a_pass_is_charged_at_its_smallest_noise():
    # Passes of four steps: (2 2 2 1) (1 1 1 1.5) (1.5 ...)
    assert count_passes(FALLING, 9, 4) == {1.0: 2, 1.5: 1}
    assert count_passes(FALLING, 9) == {2.0: 3, 1.0: 4, 1.5: 2}
    assert count_passes(3.0, 9, 4) == {3.0: 3}
    assert count_passes(FALLING, 2, 100) == {2.0: 1}


def test_many_values_are_rounded_down_never_up():
    schedule = tabulate(optax.cosine_decay_schedule(2.0, 500, 0.4), 500)
    counts = count_passes(schedule, 500)
    assert len(counts) <= MAX_NOISE_LEVELS
    assert sum(counts.values()) == 500
    exact = np.sort([float(schedule(step)) for step in range(500)])
    rounded = np.sort(np.repeat(list(counts), list(counts.values())))
    assert np.all(rounded <= exact)
    assert np.all(rounded > exact * 0.96)


def test_passes_compose_to_a_run():
    gaussian = dp_accounting.GaussianDpEvent
    one, two = (dp_accounting.SelfComposedDpEvent(gaussian(s), n) for s, n in ((2.0, 1), (1.0, 2)))
    noise = Schedule((2.0, 1.0), (4, 3))
    assert compose_passes(gaussian, noise, 7, 3) == dp_accounting.ComposedDpEvent([one, two])
    assert compose_passes(gaussian, 1.0, 6, 3) == two


def test_a_batch_with_room_for_everyone_is_a_poisson_batch():
    gaussian = dp_accounting.GaussianDpEvent(1.5)
    plain = dp_accounting.PoissonSampledDpEvent(0.1, gaussian)
    assert limited_poisson_event(100, 0.1, 100, 1.5) == plain
    assert limited_poisson_event(100, 0.1, 99, 1.5) != plain


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special"])
def test_a_known_branch_costs_between_its_two_branches(relation):
    usual, rare = dp_accounting.GaussianDpEvent(2.0), dp_accounting.GaussianDpEvent(1.0)

    def epsilon(event):
        return event_epsilon(event, delta=1e-5, relation=relation)

    between = epsilon(KnownBranchDpEvent(usual, rare, 0.01))
    assert epsilon(usual) < between < epsilon(rare)
