"""Gradient canaries: additional examples whose gradient is one coordinate, at the clip bound."""

import math
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.audit._canary_grads import CanaryGrads, SparseVectors
from dpoptax.audit._refuse_plan import as_count, refuse_plan
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._unit import as_bound
from dpoptax.mechanisms import StatefulMechanism
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._leaf_weights import weights_by_leaf
from dpoptax.samplers import CyclicPoisson, Poisson, PoissonSchedule, Sampler
from dpoptax.samplers._feistel import permute
from dpoptax.schedules import as_schedule
from dpoptax.training._audited import AuditState, Seen
from dpoptax.training._data import DeviceData, HostData

# The gradient of a canary in units of the clip bound. Rules that scale by norm + constant bring it
# to the bound too, and so do scales per coordinate, which are at least 1e-4.
NORM_IN_BOUNDS = 1e6
# Its square is finite in float32.
LARGEST_NORM = 1e18


def _count(value: Any) -> int:
    return _validate.count("num_canaries", value)


def _norm(value: Any) -> float | None:
    return None if value is None else _validate.positive("norm", value)


@attrs.frozen
class GradientCanaries:
    """A white-box audit by canaries in gradient space: pass it to `fit(..., audit=...)`.

    Each canary is an additional example. Its gradient is zero except in one coordinate of the
    parameters, which has a random sign. It is so large that the clip scales it down to the bound.
    Each canary has its own coordinate. For a clip rule with several groups of parameters, a
    canary has one coordinate in each group that has enough of them.

    The attack is the one that the guarantee is about. It sees each released gradient, before the
    optimizer, and knows everything but the noise and which canaries are in. So it subtracts what
    real examples contribute to the coordinate, where the form of the clipped sum allows it. What is
    left is the noise, plus the canary if it took part. Let x be this rest, divided by the standard
    deviation of the noise. Let z be the noise multiplier, and q the expected batch size divided by
    the number of examples. A step adds to the score

        log(1 - q + q * exp(x / z - 1 / (2 z^2)))

    This is the log likelihood ratio if each example is in the batch with probability q. If the
    noise follows a schedule, it gives each step the right weight. For other samplers it is still a
    valid score. For correlated noise a step adds x, unscaled, because the noise of later steps
    cancels some of the noise of earlier ones.

    With Poisson sampling the scores are independent, which makes lower bounds much tighter. They
    are not independent with `QuantileClip`, `DiscreteGaussian` or `scale_then_privatize`, where
    the contribution of the real examples stays in the score.

    The sampler of the plan must count the canaries among its examples, and epsilon is that of real
    examples and canaries together. Canaries disturb the training: about half of them take part. So
    train with an audit to test a setting, and again without it for the model that you use.

    Attributes:
        num_canaries: how many, in and out together. Half of them are in on average.
        norm: of the gradient of a canary; by default a million clip bounds.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is not positive. From `fit`: the plan does not count the canaries, a
            group of parameters has fewer coordinates than there are canaries, the sampler draws
            users, the guarantee is for replace_one only, or the clip has no bound.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200 + 100, 30),  # 200 rows, 100 canaries
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> result = dpoptax.training.fit(
        ...     lambda w, x: jnp.mean((w - x) ** 2), jnp.zeros(500), jnp.ones((200, 500)),
        ...     plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False,
        ...     audit=GradientCanaries(100),
        ... )
        >>> len(result.audit.in_scores) + len(result.audit.out_scores)
        100

    Reference: canaries of one run, Steinke, Nasr and Jagielski 2023, arXiv:2305.08846; canaries
    with one coordinate, Nasr et al. 2023, arXiv:2302.07956.
    """

    num_canaries: int = attrs.field(converter=_count)
    norm: float | None = attrs.field(default=None, kw_only=True, converter=_norm)

    def start(
        self,
        loss_fn: Any,
        params: PyTree,
        data: DeviceData | HostData,
        plan: Plan,
        key: PRNGKeyArray,
    ) -> "GradientAudit":
        """Returns the audit of one run; `fit` calls it."""
        del loss_fn
        refuse_plan(plan)
        bound = _largest_bound(plan)
        norm = min(NORM_IN_BOUNDS * bound, LARGEST_NORM) if self.norm is None else self.norm
        vectors, reached = draw_coordinates(params, plan, self.num_canaries, norm, key)
        return GradientAudit(data, vectors, plan, reached)


class GradientAudit:
    """The audit of one run by gradient canaries; see `dpoptax.training._audited.RunAudit`."""

    has_rows = False

    def __init__(
        self, data: DeviceData | HostData, vectors: SparseVectors, plan: Plan, reached: float
    ) -> None:
        self.data: DeviceData | HostData = data
        self.canaries: SparseVectors = vectors
        self._plan, self._reached = plan, reached
        self.attack: str = f"white-box, {as_count(len(vectors.values[0]), 'gradient')}"
        noise = as_schedule(plan.gradient_noise_multiplier)
        self._is_plain_sum = isinstance(plan.mechanism, StatefulMechanism) or noise.min == 0

    def insert(
        self, grads: PerExampleGrads, canaries: SparseVectors, slots: Int[Array, " batch"]
    ) -> PerExampleGrads:
        """See `RunAudit.insert`."""
        return CanaryGrads(grads.mask, grads, slots, canaries)

    def score(
        self, canaries: SparseVectors, step: Int[Array, ""], seen: Seen
    ) -> Float[Array, " num_canaries"]:
        """See `RunAudit.score`; the formula is in `GradientCanaries`."""
        products = canaries.products(seen.release)
        sampler = self._plan.sampler
        size = as_schedule(sampler.expected_batch_size).at(step)
        others = self._others(seen.grads)
        if others is not None:
            products = products - others / size
        if self._is_plain_sum or seen.stddev is None:
            return products
        noise = as_schedule(self._plan.gradient_noise_multiplier)
        shift = self._reached / noise.at(step)
        rate = jnp.clip(jnp.asarray(size / sampler.num_examples, jnp.float32), 1e-9, 1.0)
        ratio = shift * products / seen.stddev - jnp.square(shift) / 2
        return jnp.logaddexp(jnp.log1p(-rate), jnp.log(rate) + ratio)

    def is_independent(self, seen: Seen) -> bool:
        """See `RunAudit.is_independent`.

        Canaries have distinct coordinates, whose noise is independent. What is left after the other
        rows are taken away is the noise, and the canary if it took part. That is independent of
        other canaries for samplers that draw each example alone.
        """
        return _draws_alone(self._plan.sampler) and self._others(seen.grads) is not None

    def _others(self, grads: Any) -> Float[Array, " num_canaries"] | None:
        """Returns what other rows added to the sum, if it is known in units of the release."""
        # The sum of a rule with state is in units of its bound.
        known = isinstance(grads, CanaryGrads) and not isinstance(self._plan.clip, StatefulClipRule)
        return grads.share_of_others() if known else None

    def final_scores(self, state: AuditState, params: PyTree) -> Float[Array, " num_canaries"]:
        """See `RunAudit.final_scores`."""
        del params
        return state.scores


def _draws_alone(sampler: Sampler) -> bool:
    """Whether a sampler draws each example whatever the others are."""
    # Not their subclasses: those may draw in another way.
    if type(sampler) not in (Poisson, PoissonSchedule, CyclicPoisson):
        return False
    if not isinstance(sampler, CyclicPoisson):
        # A limit on their batches is paid from delta, so that it is seldom reached.
        return True
    return sampler.max_batch_size >= sampler.resized(None).max_batch_size


def draw_coordinates(
    params: PyTree, plan: Plan, count: int, norm: float, key: PRNGKeyArray
) -> tuple[SparseVectors, float]:
    """Returns the vectors of canaries, and the length that the clip leaves, in clip bounds.

    Raises:
        ValueError: no group of parameters has so many coordinates, or the clip leaves nothing.
    """
    leaves = jax.tree.leaves(params)
    # The positions of float32 and int32 numbers, whatever the size of a leaf.
    sizes = np.array([min(leaf.size, 2**31 - 1) for leaf in leaves])
    groups = _groups(params, plan)
    usable = [group for group in groups if sizes[group].sum() >= count]
    if not usable:
        largest = max(int(sizes[group].sum()) for group in groups)
        raise ValueError(
            "each gradient canary needs its own coordinate, in a group of parameters that "
            f"share one weight in the clip rule; got {count:,} canaries, and at most {largest:,} "
            f"coordinates in a group. Pass at most {largest:,} canaries, and plan for as many."
        )
    weights = _weights_of_canary(params, plan, [group[0] for group in usable], norm)
    contributions = [norm * weights[group[0]] for group in usable]
    length = math.sqrt(sum(part**2 for part in contributions))
    if not length > 0:
        raise ValueError(
            "the clip rule gives a gradient canary the weight zero, so nothing would be audited; "
            f"its gradient has the norm {norm:g}. Pass GradientCanaries(..., norm=number) with a "
            "norm that the rule keeps."
        )
    values = [np.zeros(count, np.float32) for _ in leaves]
    directions = [np.zeros(count, np.float32) for _ in leaves]
    positions = [np.zeros((count, leaf.ndim), np.int32) for leaf in leaves]
    for group, contribution in zip(usable, contributions, strict=True):
        # Distinct places in the group, then the leaf and the coordinate of each.
        place_key, sign_key = jax.random.split(jax.random.fold_in(key, group[0]))
        total = min(int(sizes[group].sum()), 2**31 - 1)
        places = np.asarray(permute(place_key, jnp.arange(count), total))
        signs = np.asarray(jax.random.rademacher(sign_key, (count,), jnp.float32))
        ends = np.cumsum(sizes[group])
        for number, leaf in enumerate(group):
            (mine,) = np.nonzero(np.searchsorted(ends, places, side="right") == number)
            flat = places[mine] - (ends[number] - sizes[leaf])
            if leaves[leaf].ndim:
                positions[leaf][mine] = np.stack(np.unravel_index(flat, leaves[leaf].shape), 1)
            values[leaf][mine] = norm * signs[mine]
            directions[leaf][mine] = contribution / length * signs[mine]
    vectors = SparseVectors(
        *(list(map(jnp.asarray, part)) for part in (positions, values, directions))
    )
    return vectors, length / float(as_bound(_first_rule(plan), 0))


def _first_rule(plan: Plan) -> Any:
    clip: Any = plan.clip
    return clip.at(clip.init()) if isinstance(clip, StatefulClipRule) else clip


def _largest_bound(plan: Plan) -> float:
    rule = _first_rule(plan)
    bound = float(rule.l2_clip) if isinstance(rule.l2_clip, jax.Array) else None
    found = as_schedule(rule.l2_clip).max if bound is None else bound
    if not math.isfinite(found):
        raise ValueError(
            "an audit needs a clip rule with a finite bound; got a bound of infinity, which gives "
            "no guarantee. Pass a clip such as 1.0."
        )
    return found


def _groups(params: PyTree, plan: Plan) -> list[list[int]]:
    """Returns the numbers of the leaves in each group that the clip rule weighs by one number."""
    norms = jax.tree.map(lambda _: jnp.zeros(1, jnp.float32), params)
    weights = jax.eval_shape(lambda norms: _first_rule(plan).weights(norms, 0), norms)
    numbers = iter(range(len(jax.tree.leaves(weights))))
    names = jax.tree.leaves(
        jax.tree.broadcast(jax.tree.map(lambda _: next(numbers), weights), params)
    )
    return [[leaf for leaf, name in enumerate(names) if name == own] for own in sorted(set(names))]


def _weights_of_canary(params: PyTree, plan: Plan, used: list[int], norm: float) -> list[float]:
    """Returns the weight of each leaf for a gradient of this norm in each of the leaves `used`."""
    structure: Any = jax.tree.structure(params)
    squares = [
        np.full(1, norm**2 if leaf in used else 0.0, np.float32)
        for leaf in range(structure.num_leaves)
    ]

    def weights(squares: list[Array]) -> Array:
        found = _first_rule(plan).weights(jax.tree.unflatten(structure, squares), 0)
        return jnp.stack(weights_by_leaf(found, structure, jnp.ones(1, bool)))

    # One small program in place of many.
    return np.asarray(jax.jit(weights)(squares))[:, 0].tolist()
