"""Privacy of correlated noise: the event of a run with a strategy, under each sampler.

The noise of step t is row t of C^-1 Z, in units of noise multiplier times clip bound, for a public
lower triangular matrix C and independent normal draws Z. To release the noisy sums is to release
C x + Z, where row t of x is the clipped sum of step t: each follows from the other. The sums may
depend on earlier releases, because C is lower triangular (Denisov et al. 2022, arXiv:2202.08312,
theorem 2.1).

**With amplification.** Let C have b nonzero diagonals, and let the group of an example have its
turns at the steps s_1 < s_2 < ..., at least b apart. Take the rows of C x + Z from one turn s to
before the next one, and give the adversary all earlier rows and the batches of all steps but s.

1. Row t of the block is C[t, s] x_s + mu_t + Z_t. Here mu_t is made of the sums of other steps.
   They are of other groups. Or they are of earlier turns, whose columns end before the block.
   The former follow from the batches that the adversary was given and from released rows. So the
   adversary can subtract mu_t, by the same rule for both neighbours.
2. What is left is x_s times column s of C, plus normal noise. Its projection onto that column is
   sufficient for x_s: it is the noisy sum of this one step, with noise that is 1 / norm(column s)
   times that of the plan. Columns have norm one at most, so the plan's step costs at least as much.
3. Blocks are composed adaptively. Rows before the first turn are the same for both neighbours.

So the run costs at most what its sampler's own event says for independent noise. Nothing was
assumed of the law of x_s but that the batch of a step is drawn independently of all others. So the
theorem holds for batches that are cut to a capacity, where an example can displace another one of
its group and move x_s by two clip bounds; for every relation that the sampler has a proof for; and
for a run that ends within a block. For untruncated batches it is theorem 4 of Choquette-Choo et al.
2023, arXiv:2306.08153. It does not hold for groups of examples whose turns differ: their blocks
overlap. Their epsilon follows from that of one example.

**Without amplification.** Where it is known in which steps an example can take part, the run is one
Gaussian mechanism, and `mechanisms.strategies.sensitivity` says how far an example moves C x.
"""

import functools
from collections.abc import Callable
from typing import Any

import dp_accounting
from dp_accounting import NeighboringRelation

from dpoptax._dp_events import (
    KnownBranchDpEvent,
    OneExampleDpEvent,
    TruncatedRandomAllocationDpEvent,
)
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._state import AnyClipRule
from dpoptax.mechanisms import Correlated
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies import Cyclic, OncePerRound, sensitivity
from dpoptax.mechanisms.strategies._participation import Participation
from dpoptax.samplers import BallsInBins, CyclicPoisson, Sampler, Shuffled
from dpoptax.schedules import ScalarOrSchedule, as_schedule

# In which steps an example can take part, by sampler. A new sampler joins by one line.
PARTICIPATIONS: dict[type, Callable[[Any], Participation]] = {
    Shuffled: lambda sampler: OncePerRound(sampler.steps_per_epoch),
    BallsInBins: lambda sampler: OncePerRound(sampler.steps_per_round),
}


def strategy_of(mechanism: AnyMechanism) -> Strategy | None:
    """Returns the strategy of correlated noise; None for independent noise."""
    return mechanism.strategy if isinstance(mechanism, Correlated) else None


def correlated_event(
    strategy: Strategy,
    sampler: Sampler,
    noise_multiplier: ScalarOrSchedule,
    num_steps: int,
    relation: NeighboringRelation,
) -> dp_accounting.DpEvent:
    """Returns the event of the first `num_steps` steps of a run with correlated noise.

    Raises:
        ValueError: the noise changes, the run is longer than the strategy, or nothing is proven
            about the sampler.
    """
    check_horizon(strategy, num_steps)
    noise = constant_noise(noise_multiplier, num_steps)
    check_sampler(strategy, sampler)
    # Refuses relations that the sampler has no proof for.
    event = sampler.event(noise or 1.0, max(num_steps, 1), relation)
    if num_steps == 0:
        return dp_accounting.NoOpDpEvent()
    if noise == 0:
        return dp_accounting.NonPrivateDpEvent()
    if strategy.num_bands == 1:
        return event
    # The class itself, because a subclass may draw other batches.
    if type(sampler) is CyclicPoisson:
        # A group of examples may have different turns, so that nothing is amplified for it. With
        # an example more, another one may be displaced.
        factor = 2 if relation == NeighboringRelation.ADD_OR_REMOVE_ONE else 1
        moves = factor * _sensitivity(strategy, Cyclic(sampler.num_groups), num_steps)
        for_groups = dp_accounting.GaussianDpEvent(noise / moves)
        return OneExampleDpEvent(event, count=1, for_groups=for_groups)
    moves = _sensitivity(strategy, PARTICIPATIONS[type(sampler)](sampler), num_steps)
    usual = dp_accounting.GaussianDpEvent(noise / moves)
    probability = _probability_of_displacing(sampler, num_steps, relation)
    if probability == 0:
        return usual
    # Whether the other examples fill a batch does not depend on this one, and may be known.
    return KnownBranchDpEvent(
        usual, dp_accounting.GaussianDpEvent(noise / (2 * moves)), probability
    )


def check_horizon(strategy: Strategy, num_steps: int) -> None:
    """Raises if the strategy does not cover so many steps."""
    if num_steps > strategy.num_steps:
        raise ValueError(
            f"the strategy {type(strategy).__name__} covers {strategy.num_steps:,} steps; got a "
            f"run of {num_steps:,}. Noise beyond its last step would have no guarantee. Make the "
            "strategy for all steps before the run starts, or start a new run and count both."
        )


def constant_noise(noise_multiplier: ScalarOrSchedule, num_steps: int) -> float:
    """Returns the one noise multiplier of a run with correlated noise."""
    noise = as_schedule(noise_multiplier).slice(0, max(num_steps, 1))
    if noise.min != noise.max:
        raise ValueError(
            "correlated noise needs one noise_multiplier for all steps; got one that changes, "
            f"from {noise.min:g} to {noise.max:g}. Pass a number, or use independent noise."
        )
    return noise.min


def check_clip(mechanism: AnyMechanism, clip: AnyClipRule) -> None:
    """Raises if the clip bound changes between steps that share noise."""
    if strategy_of(mechanism) is None:
        return
    if isinstance(clip, StatefulClipRule):
        changes = True
    else:
        bound = as_schedule(clip.l2_clip)
        changes = bound.min != bound.max
    if changes:
        raise ValueError(
            f"correlated noise needs one clip bound for all steps; got {type(clip).__name__}, "
            "whose bound changes. Pass a number or a rule with a fixed bound, or use independent "
            "noise."
        )


def check_sampler(strategy: Strategy, sampler: Sampler) -> None:
    """Raises unless something is proven about this strategy under this sampler."""
    bands, name = strategy.num_bands, type(sampler).__name__
    if bands == 1 or type(sampler) in PARTICIPATIONS:
        return
    if type(sampler) is not CyclicPoisson:
        raise ValueError(
            f"nothing is proven about correlated noise under {name}, except for strategies of one "
            f"band; got {type(strategy).__name__} with {bands:,} bands. Take "
            "samplers.CyclicPoisson with at least as many groups as bands; "
            "dpoptax.correlated_plan chooses both."
        )
    if sampler.num_groups < bands:
        raise ValueError(
            f"correlated noise needs at least as many groups as bands; got num_groups="
            f"{sampler.num_groups} in {name} and {bands:,} bands in {type(strategy).__name__}. "
            f"Pass num_groups={bands}, or a BandedToeplitz of {sampler.num_groups} bands. A "
            "banded inverse and a BLT have as many bands as steps: take Shuffled for them."
        )


# One entry per strategy and sampler; a calibration asks for the same one at every noise.
@functools.lru_cache(maxsize=64)
def _sensitivity(strategy: Strategy, participation: Participation, num_steps: int) -> float:
    return sensitivity(strategy, participation, num_steps)


def _probability_of_displacing(
    sampler: Sampler, num_steps: int, relation: NeighboringRelation
) -> float:
    """A bound on the probability that the others fill any batch that an added example joins."""
    is_fixed = relation != NeighboringRelation.ADD_OR_REMOVE_ONE
    # Neighbours with equally many examples fill the same batches.
    if is_fixed or not isinstance(sampler, BallsInBins):
        return 0.0
    if sampler.max_batch_size == sampler.num_examples:
        return 0.0
    sizes = (sampler.num_examples, sampler.steps_per_round, sampler.max_batch_size)
    one_round = TruncatedRandomAllocationDpEvent(*sizes, noise_multiplier=1.0)
    rounds = -(-num_steps // sampler.steps_per_round)
    return min(rounds * one_round.probability_of_full(), 1.0)


def describe_participation(strategy: Strategy, sampler: Sampler, num_steps: int) -> str:
    """Returns in words in which steps one unit takes part, as the guarantee assumes."""
    unit = sampler.unit
    if strategy.num_bands == 1:
        return f"each {unit} may take part in any step, for noise of other steps is independent"
    if type(sampler) is CyclicPoisson:
        turns = -(-num_steps // sampler.num_groups)
        return (
            f"each {unit} can take part in {turns:,} steps at most, {sampler.num_groups} steps "
            "apart. Chance decides in which of them it does"
        )
    participation = PARTICIPATIONS[type(sampler)](sampler)
    assert isinstance(participation, OncePerRound), "the only kind so far"
    moves = sensitivity(strategy, participation, max(num_steps, 1))
    return (
        f"each {unit} takes part in one step of every {participation.period:,}, in "
        f"{participation.largest_count(num_steps):,} steps at most. Together they move the sums by "
        f"up to {moves:.4g} times the bound of one step. The order of the {unit}s is not counted "
        "as protection"
    )
