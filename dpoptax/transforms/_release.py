"""The noisy sum of one step, for clip rules and mechanisms without and with state.

A rule with state has two queries on each batch: the clipped gradients, in units of the bound of
this step, and the votes of the examples. Both get noise, from keys of their own. What follows, the
multiplication by the bound and the next state of the rule, uses released numbers only.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.clipping._check_rule import check_fits
from dpoptax.clipping._count_noise import split_noise
from dpoptax.clipping._state import AnyClipRule, StatefulClipRule
from dpoptax.clipping._unit import UnitClip, as_bound, first_rule
from dpoptax.mechanisms import StatefulMechanism
from dpoptax.mechanisms._base import ReleasesVotes
from dpoptax.mechanisms._state import AnyMechanism, NoiseKeys
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._counted import CountedGrads, vote_counter
from dpoptax.random import derive_key
from dpoptax.random._derive import fingerprint
from dpoptax.schedules import ScalarOrSchedule, as_schedule
from dpoptax.transforms import _mechanism_state
from dpoptax.transforms._private import released_noise_stddev

# Up to here float32 holds a sum of votes exactly.
MOST_VOTES = 2**24


class ReleaseState(NamedTuple):
    """The states of the clip rule and of the mechanism; empty for those that have none."""

    clip: PyTree
    mechanism: PyTree


class SumRelease:
    """Clips and sums gradients, and adds noise, as a function of the states of rule and mechanism.

    Attributes:
        settings: what decides the release: clip rule, its bound or the noise of its votes, noise
            multiplier, expected batch size, mechanism.
        identity: a text of these, for the noise keys.
    """

    def __init__(
        self,
        rule: AnyClipRule,
        noise_multiplier: ScalarOrSchedule,
        expected_batch_size: ScalarOrSchedule,
        mechanism: AnyMechanism,
    ) -> None:
        check_release(rule, noise_multiplier, mechanism)
        self._rule, self._noise, self._mechanism = rule, noise_multiplier, mechanism
        self._size = expected_batch_size
        # A property of a class, which is no field, apart from the rule.
        setting = rule.count_noise if isinstance(rule, StatefulClipRule) else rule.l2_clip
        self.settings = (rule, setting, noise_multiplier, expected_batch_size, mechanism)
        self.identity = fingerprint(*self.settings)

    def init(self, params: PyTree, key: PRNGKeyArray) -> ReleaseState:
        """Returns the states before the first step."""
        return ReleaseState(
            self._init_rule(), _mechanism_state.init(self._mechanism, self.identity, params, key)
        )

    def _init_rule(self) -> PyTree:
        return self._rule.init() if isinstance(self._rule, StatefulClipRule) else ()

    def check_fits(self, params: PyTree) -> None:
        """Raises if the groups of the rule do not fit the parameters."""
        check_fits(first_rule(self._rule), params)

    def noise_stddev(self, clip_state: PyTree, step: Int[Array, ""] | int) -> Any:
        """Returns the standard deviation of the noise in each coordinate of the released mean."""
        rule, noise = self._rule, self._noise
        if not isinstance(rule, StatefulClipRule):
            independent = released_noise_stddev(rule, noise, self._size, step)
            return independent if self._scales is None else independent * self._scale(step)
        gradients = split_noise(noise, rule.count_noise).gradients
        unit = released_noise_stddev(UnitClip(rule.at(clip_state)), gradients, self._size, step)
        return unit * as_bound(rule.at(clip_state), step)

    @functools.cached_property
    def _scales(self) -> np.ndarray | None:
        """The noise of each step in units of independent noise; None for independent noise."""
        if not isinstance(self._mechanism, StatefulMechanism):
            return None
        scales = np.asarray(self._mechanism.noise_scales(), np.float32)
        # Most strategies settle after a few steps. The last number holds for all later ones.
        changes = np.flatnonzero(np.diff(scales))
        return scales[: changes[-1] + 2] if changes.size else scales[:1]

    def _scale(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        assert self._scales is not None
        return jnp.asarray(self._scales)[jnp.minimum(step, len(self._scales) - 1)]

    def __call__(
        self,
        keys: NoiseKeys,
        grads: PerExampleGrads,
        state: ReleaseState,
        step: Int[Array, ""] | int,
    ) -> tuple[PyTree, ReleaseState]:
        """Returns the noisy sum, and the next states."""
        rule, mechanism = self._rule, self._mechanism
        self._check_state(state.clip)
        if isinstance(mechanism, StatefulMechanism):
            assert not isinstance(rule, StatefulClipRule)
            noisy, inner = _mechanism_state.release(
                *(mechanism, self.identity, keys, grads, rule, self._noise, step, state.mechanism)
            )
            return noisy, ReleaseState(state.clip, inner)
        _mechanism_state.refuse(mechanism, state.mechanism)
        if not isinstance(rule, StatefulClipRule):
            return mechanism.release(keys.current, grads, rule, self._noise, step), state
        noisy, clip_state = self._release_with_votes(rule, keys.current, grads, state.clip, step)
        return noisy, state._replace(clip=clip_state)

    def _release_with_votes(
        self,
        rule: StatefulClipRule,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip_state: PyTree,
        step: Int[Array, ""] | int,
    ) -> tuple[PyTree, PyTree]:
        mechanism: Any = self._mechanism
        batch = len(grads.mask)
        if batch >= MOST_VOTES:
            raise ValueError(
                f"a clip rule with state counts batches of less than {MOST_VOTES:,} rows; got "
                f"{batch:,}. Use a smaller batch, or a rule without state."
            )
        key = fold_in_bits(key, clip_state)
        noise = split_noise(self._noise, rule.count_noise)
        now = rule.at(clip_state)
        counted = CountedGrads(
            grads, vote_counter(lambda squared_norms: rule.votes(squared_norms, clip_state))
        )
        noisy = mechanism.release(key, counted, UnitClip(now), noise.gradients, step)
        assert isinstance(mechanism, ReleasesVotes)
        # By name: the mechanism splits the key itself for the leaves of the gradient.
        votes = mechanism.release_votes(
            derive_key(key, "votes"), counted.count(), noise.votes, step, batch
        )
        bound = as_bound(now, step)
        noisy = jax.tree.map(lambda leaf: leaf * bound.astype(leaf.dtype), noisy)
        return noisy, rule.update(clip_state, votes, as_schedule(self._size).at(step))

    def _check_state(self, clip_state: PyTree) -> None:
        expected: Any = jax.tree.structure(jax.eval_shape(self._init_rule))
        found: Any = jax.tree.structure(clip_state)
        if found != expected:
            raise ValueError(
                f"expected a state of the clip rule {type(self._rule).__name__}, {expected}; got "
                f"a state of another clip rule, or of an earlier version, with {found}. Continue "
                "with the rule of that run, or start a new run and count both."
            )


def check_release(
    rule: AnyClipRule, noise_multiplier: ScalarOrSchedule, mechanism: AnyMechanism
) -> None:
    """Raises if the mechanism cannot add this noise under this rule.

    Raises:
        TypeError: the rule has state, and the mechanism has state too, or no `release_votes`.
        ValueError: the mechanism refuses the rule or the noise; or the votes of a rule with state
            cost more than the whole step may.
    """
    if not isinstance(rule, StatefulClipRule):
        mechanism.check(rule, noise_multiplier)
        return
    if isinstance(mechanism, StatefulMechanism):
        raise TypeError(
            f"the bound of the clip rule {type(rule).__name__} changes during a run, and the noise "
            f"of {type(mechanism).__name__} needs a constant bound, because the steps of a run are "
            "accounted together. Use a rule without state such as clipping.FlatClip, or "
            "mechanisms.Gaussian()."
        )
    if not isinstance(mechanism, ReleasesVotes):
        raise TypeError(
            f"the clip rule {type(rule).__name__} has state, and needs a mechanism with "
            f"release_votes; got {type(mechanism).__name__} without it. Add it, see "
            "dpoptax.mechanisms.Mechanism, or use a rule without state."
        )
    noise = split_noise(noise_multiplier, rule.count_noise)
    mechanism.check(first_rule(rule), noise.gradients)


def fold_in_bits(key: PRNGKeyArray, state: PyTree) -> PRNGKeyArray:
    """Returns a key that depends on the bits of a small state.

    The bound scales the noise. Two releases with other bounds and the same noise would reveal the
    difference of their sums.
    """
    for leaf in jax.tree.leaves(state):
        numbers = jnp.asarray(leaf, jnp.float32).reshape(-1)
        for word in jax.lax.bitcast_convert_type(numbers, jnp.uint32):
            key = jax.random.fold_in(key, word)
    return key
