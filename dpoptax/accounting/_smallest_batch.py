"""The padded size of random batches: as small as it may be without raising epsilon noticeably.

Batches of random size are padded to a static one. Longer batches are drawn again, or are cut. A
size that is never exceeded wastes time on padding. A smaller one costs epsilon: it makes every
batch a little less likely with one example more, or lets that example displace another one.
"""

import functools
import math

import dp_accounting

from dpoptax.accounting._attack_risk import AttackRisk
from dpoptax.accounting._budget import Budget
from dpoptax.accounting._calibrate import (
    CalibratedNoise,
    calibrate_noise_multiplier,
    with_noise_for,
)
from dpoptax.accounting._epsilon import coarse_epsilon, resolve_relation, run_event
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.samplers import Sampler
from dpoptax.schedules import ScalarOrSchedule, as_schedule

# How much of epsilon smaller batches may cost.
MAX_COST = 1e-3
# Below this size there is little padding to save, and a search would take longer.
SMALLEST_SEARCHED = 64
# The cost is that of runs with so many steps, a short and a long one. The cost of batches that are
# drawn again grows with the steps, and epsilon with their square root: the long run decides, and
# an even longer one pays a little more.
# For batches that are cut, the size hardly depends on the length, and the short run may decide.
NUM_STEPS = (100, 30_000)
# Sizes are multiples of this, so that the usual numbers of devices can share a batch.
MULTIPLE = 8
# Epsilon is compared on a grid that is coarser by this factor, and as much faster to compute.
COARSENING = 4.0


def with_smallest_batch(
    sampler: Sampler, noise_multiplier: ScalarOrSchedule, delta: float
) -> Sampler:
    """Returns the sampler with the smallest batches that cost at most MAX_COST of epsilon.

    The size does not depend on the number of steps, so that a run can be extended.

    A `max_batch_size` that the user chose stays as it is. So does every size under a sampler
    without `resized`.
    """
    default = sampler.resized(None)
    if default is None or sampler.max_batch_size != default.max_batch_size:
        return sampler
    noise = as_schedule(noise_multiplier).min
    if sampler.max_batch_size < SMALLEST_SEARCHED or noise == 0:
        return sampler
    size = _smallest_size(_ByEvent(sampler), noise, delta)
    return sampler.resized(size) or sampler


def calibrate_with_smallest_batch(
    sampler: Sampler,
    num_steps: int,
    epsilon: float | None,
    delta: float,
    earlier: dp_accounting.DpEvent | None = None,
    mechanism: AnyMechanism = Gaussian(),
    risk: AttackRisk | None = None,
) -> tuple[Sampler, CalibratedNoise]:
    """Returns the sampler with small batches, and the least noise that costs at most `epsilon`.

    A `risk` may take the place of epsilon. The budget also pays for `earlier`, the event of other
    releases on the same data.
    """
    found = calibrate_noise_multiplier(
        sampler=sampler,
        epsilon=epsilon,
        risk=risk,
        delta=delta,
        num_steps=num_steps,
        earlier=earlier,
        mechanism=mechanism,
    )
    smaller = with_smallest_batch(sampler, found.noise_multiplier, delta)
    if smaller is not sampler:
        # Smaller batches cost a little, which a little more noise makes up for.
        budget = Budget(epsilon, delta, None, earlier, mechanism, risk)
        found = with_noise_for(smaller, found, budget, num_steps)
    return smaller, found


class _ByEvent:
    """A sampler as an argument of a cached function: compared by its event and its sizes."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._event = sampler.event(1.0, 1)
        # An event need not depend on the sizes.
        self._sizes = (type(sampler), sampler.num_examples, sampler.max_batch_size)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _ByEvent)
            and self._sizes == other._sizes
            and self._event == other._event
        )

    def __hash__(self) -> int:
        # Some events cannot be hashed.
        return hash(self._sizes)


@functools.lru_cache(maxsize=64)
def _smallest_size(argument: _ByEvent, noise_multiplier: float, delta: float) -> int:
    sampler = argument.sampler
    relation = resolve_relation(None, sampler.relation)

    def epsilon(size: int, num_steps: int) -> float:
        resized = sampler.resized(size)
        assert resized is not None, "the sampler has other sizes"
        event = run_event(resized, noise_multiplier, num_steps, sampler.relation)
        return coarse_epsilon(event, delta=delta, relation=relation, coarsening=COARSENING)

    highest = sampler.max_batch_size
    budgets = {steps: (1 + MAX_COST) * epsilon(highest, steps) for steps in NUM_STEPS}
    # A very long run with little noise may have no finite epsilon.
    budgets = {steps: budget for steps, budget in budgets.items() if math.isfinite(budget)}
    if not budgets:
        return highest
    expected = as_schedule(sampler.expected_batch_size).max
    # The cost falls steeply with the size. Six of the default's seven standard deviations are more
    # than enough, and three are too few.
    feasible, infeasible = highest, int(expected + (highest - expected) / 3)
    # The largest multiple that is smaller than the default, and the first one below the range.
    high, low = (highest - 1) // MULTIPLE, infeasible // MULTIPLE
    while high > low:
        middle = (low + 1 + high) // 2
        if all(epsilon(MULTIPLE * middle, steps) <= most for steps, most in budgets.items()):
            feasible, high = MULTIPLE * middle, middle - 1
        else:
            low = middle
    return feasible
