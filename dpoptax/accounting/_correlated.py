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
theorem holds for batches of limited size, where one example changes how likely the others of its
group are to take part; for every relation that the sampler has a proof for; and for a run that ends
within a block. For untruncated batches it is theorem 4 of Choquette-Choo et al.
2023, arXiv:2306.08153. It does not hold for groups of examples whose turns differ: their blocks
overlap. Their epsilon follows from that of one example.

**Without amplification.** Where it is known in which steps an example can take part, the run is one
Gaussian mechanism, and `mechanisms.strategies.sensitivity` says how far an example moves C x.
"""

import functools

import dp_accounting
from dp_accounting import NeighboringRelation

from dpoptax._dp_events import KnownBranchDpEvent, OneExampleDpEvent
from dpoptax._patterns import Pattern
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._state import AnyClipRule
from dpoptax.mechanisms import Correlated
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies import Cyclic, OncePerRound, sensitivity
from dpoptax.samplers import Participation, Sampler
from dpoptax.schedules import ScalarOrSchedule, as_schedule


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
    participation = _participation_of(sampler, num_steps)
    adds = relation == NeighboringRelation.ADD_OR_REMOVE_ONE
    moves = _sensitivity(strategy, participation.pattern, num_steps)
    if _is_amplified(strategy, participation):
        # A group of examples may have different turns, so that nothing is amplified for it. With
        # an example more, another one may be displaced.
        for_groups = dp_accounting.GaussianDpEvent(noise / (2 * moves if adds else moves))
        return OneExampleDpEvent(event, 1, for_groups)
    usual = dp_accounting.GaussianDpEvent(noise / moves)
    if not adds or participation.crowded == 0:
        return usual
    # Whether the other examples fill a batch does not depend on this one, and may be known.
    displaced = dp_accounting.GaussianDpEvent(noise / (2 * moves))
    return KnownBranchDpEvent(usual, displaced, participation.crowded)


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
    if bands == 1:
        return
    # Nothing that is read here depends on the number of steps.
    participation = sampler.participation(1)
    if participation is None or not _speaks_for_itself(sampler):
        raise ValueError(
            f"nothing is proven about correlated noise under {name}, except for strategies of one "
            f"band; got {type(strategy).__name__} with {bands:,} bands. Take "
            "samplers.CyclicPoisson with at least as many groups as bands; "
            "dpoptax.correlated_plan chooses both."
        )
    if participation.independent and not _is_amplified(strategy, participation):
        groups = participation.min_separation
        raise ValueError(
            f"correlated noise needs at least as many groups as bands; got num_groups="
            f"{groups} in {name} and {bands:,} bands in {type(strategy).__name__}. "
            f"Pass num_groups={bands}, or a BandedToeplitz of {groups} bands. A "
            "banded inverse and a BLT have as many bands as steps: take Shuffled for them."
        )


def _speaks_for_itself(sampler: Sampler) -> bool:
    """Whether the pattern is that of the batches: a subclass may draw others, and inherit it."""
    depths = {
        name: next(depth for depth, cls in enumerate(type(sampler).__mro__) if name in vars(cls))
        for name in ("participation", "init", "sample")
    }
    return depths["participation"] == min(depths.values())


def _is_amplified(strategy: Strategy, participation: Participation) -> bool:
    """Whether the event of the sampler holds for this noise; see the proof above."""
    return participation.independent and strategy.num_bands <= participation.min_separation


def _participation_of(sampler: Sampler, num_steps: int) -> Participation:
    participation = sampler.participation(num_steps)
    assert participation is not None  # `check_sampler` was called
    return participation


# One entry per strategy and sampler; a calibration asks for the same one at every noise.
@functools.lru_cache(maxsize=64)
def _sensitivity(strategy: Strategy, pattern: Pattern, num_steps: int) -> float:
    return sensitivity(strategy, pattern, num_steps)


def describe_participation(strategy: Strategy, sampler: Sampler, num_steps: int) -> str:
    """Returns in words in which steps one unit takes part, as the guarantee assumes."""
    unit = sampler.unit
    if strategy.num_bands == 1:
        return f"each {unit} may take part in any step, for noise of other steps is independent"
    steps = max(num_steps, 1)
    participation = _participation_of(sampler, steps)
    separation = participation.min_separation
    if _is_amplified(strategy, participation):
        return (
            f"each {unit} can take part in {participation.max_count:,} steps at most, {separation} "
            "steps apart. Chance decides in which of them it does"
        )
    moves = sensitivity(strategy, participation.pattern, steps)
    spread = f"in steps that are at least {separation:,} apart"
    match participation.pattern:
        case OncePerRound(period=period):
            spread = f"in one step of every {period:,}"
        case Cyclic(period=period):
            spread = f"in every step number {period:,}"
    return (
        f"each {unit} takes part {spread}, in {participation.max_count:,} steps at most. Together "
        f"they move the sums by up to {moves:.4g} times the bound of one step. The order of the "
        f"{unit}s is not counted as protection"
    )
