"""Input canaries: additional rows of the data, such as mislabelled or unusual examples."""

from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.audit._refuse_plan import as_count, refuse_plan
from dpoptax.clipping._unit import as_bound, first_rule
from dpoptax.per_example import PerExampleGrads, per_example_grads
from dpoptax.per_example._validate_loss import takes_key
from dpoptax.samplers import Batch
from dpoptax.schedules import as_schedule
from dpoptax.training._audited import AuditState, Seen
from dpoptax.training._data import DeviceData, HostData, take_plain
from dpoptax.training._objective import Objective

# Losses and directional derivatives of canaries are computed for so many at a time.
AT_ONCE = 64


def _draws(value: Any) -> int:
    return _validate.count("num_draws", value)


@attrs.frozen(eq=False)
class InputCanaries:
    """An audit by canaries that are examples: pass it to `fit(..., audit=...)`.

    The canaries are additional rows after the rows of the data. The run treats them like any
    example: loss, gradient, clip and sum. So the audit also sees faults of the loss, which gradient
    canaries do not. But the gradient of an example is known less well than a coordinate, so the
    lower bounds are usually much lower.

    The black-box attack sees the initial and the final parameters. Its score is the loss of the
    canary before training minus the loss after it. The white-box attack sees each released
    gradient. With g the canary's gradient at the parameters of the step, s the standard deviation
    of the noise, C the clip bound and z the noise multiplier, a step adds to the score

        min(1, |g| / C) / z * <release, g> / (|g| s)

    If the loss takes a key, the black-box score is a mean over `num_draws` keys.

    Attributes:
        examples: a tree like the data, with a leading axis of num_canaries. See `mislabelled` and
            `uniform_inputs`, or craft them. They must not be rows of the data.
        white_box: whether the attack sees the released gradients.
        num_draws: over how many keys a loss is averaged.

    Raises:
        TypeError: (from `fit`) the loss is an `Objective`.
        ValueError: there is no example. From `fit`: the examples differ from the data in their
            fields, shapes or types, or the plan does not fit, as for `GradientCanaries`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200 + 20, 30),  # 200 rows, 20 canaries
        ...     clip=1.0, noise_multiplier=1.0, num_steps=20, delta=1e-4,
        ... )
        >>> result = dpoptax.training.fit(
        ...     lambda w, x: jnp.sum((w - x) ** 2), jnp.zeros(50), jnp.zeros((200, 50)),
        ...     plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False,
        ...     audit=InputCanaries(5.0 * jnp.eye(20, 50)),
        ... )
        >>> result.audit.attack
        'black-box, 20 input canaries'
    """

    examples: PyTree = attrs.field(repr=False)
    white_box: bool = attrs.field(default=False, kw_only=True)
    num_draws: int = attrs.field(default=8, kw_only=True, converter=_draws)

    @property
    def num_canaries(self) -> int:
        """How many canaries there are, in and out."""
        count = _validate.leading_axis_size("examples", self.examples)
        return _validate.count("the number of canaries", count)

    def start(
        self,
        loss_fn: Any,
        params: PyTree,
        data: DeviceData | HostData,
        plan: Plan,
        key: PRNGKeyArray,
    ) -> "InputAudit":
        """Returns the audit of one run; `fit` calls it."""
        refuse_plan(plan)
        if isinstance(loss_fn, Objective):
            raise TypeError(
                "input canaries are scored by a loss of one example; got "
                f"{type(loss_fn).__name__}, which is more than that. Pass GradientCanaries."
            )
        examples = jax.tree.map(np.asarray, self.examples)
        _refuse_other_fields(examples, data.first_example())
        # As the loss gets them: `take` may change the rows.
        count = self.num_canaries
        batch = Batch(jnp.arange(count, dtype=jnp.int32), jnp.ones(count, bool))
        taken, _ = take_plain(data.take, jax.tree.map(jnp.asarray, examples), batch)
        losses = _Losses(loss_fn, self.num_draws)
        canaries = {"examples": taken, "key": key, "first": params}
        if self.white_box:
            del canaries["first"]
        return InputAudit(_with_rows(data, examples), canaries, plan, losses, self.white_box)


class InputAudit:
    """The audit of one run by input canaries; see `dpoptax.training._audited.RunAudit`."""

    has_rows = True

    def __init__(
        self,
        data: DeviceData | HostData,
        canaries: dict[str, PyTree],
        plan: Plan,
        losses: "_Losses",
        white_box: bool,
    ) -> None:
        self.data: DeviceData | HostData = data
        self.canaries: dict[str, PyTree] = canaries
        self._plan, self._losses, self._white_box = plan, losses, white_box
        count = _validate.leading_axis_size("examples", canaries["examples"])
        self.attack: str = f"{'white' if white_box else 'black'}-box, {as_count(count, 'input')}"

    def insert(
        self, grads: PerExampleGrads, canaries: PyTree, slots: Int[Array, " batch"]
    ) -> PerExampleGrads:
        """See `RunAudit.insert`: the rows are in the data."""
        del canaries, slots
        return grads

    def score(
        self, canaries: Any, step: Int[Array, ""], seen: Seen
    ) -> Float[Array, " num_canaries"]:
        """See `RunAudit.score`; the formula is in `InputCanaries`."""
        if not self._white_box:
            return jnp.zeros(_validate.leading_axis_size("examples", canaries["examples"]))
        key = jax.random.fold_in(canaries["key"], step)
        products, norms = self._losses.along(seen.release, seen.params, canaries["examples"], key)
        noise = as_schedule(self._plan.gradient_noise_multiplier)
        # The bound of the first step where the rule has a state: this only weighs the canaries.
        rule = first_rule(self._plan.clip)
        shift = jnp.minimum(1.0, norms / as_bound(rule, step).astype(jnp.float32))
        products = jnp.where(norms > 0, products / jnp.where(norms > 0, norms, 1.0), 0.0)
        if seen.stddev is None or noise.min == 0:
            return shift * products
        return shift / noise.at(step) * products / seen.stddev

    def is_independent(self, seen: Seen) -> bool:
        """See `RunAudit.is_independent`: all canaries change the same parameters."""
        del seen
        return False

    def final_scores(self, state: AuditState, params: PyTree) -> Float[Array, " num_canaries"]:
        """See `RunAudit.final_scores`."""
        if self._white_box:
            return state.scores
        held: Any = state.canaries
        before = self._losses.mean(held["first"], held["examples"], held["key"])
        return before - self._losses.mean(params, held["examples"], held["key"])


class _Losses:
    """The loss of one example, with keys or without, for all canaries."""

    def __init__(self, loss_fn: Any, num_draws: int) -> None:
        self._needs_key = takes_key(loss_fn)
        self._loss_fn = loss_fn
        self._num_draws = num_draws
        self.mean: Any = jax.jit(self._mean)

    def _scalar(self, params: PyTree, example: PyTree, key: Array) -> Float[Array, ""]:
        keys = (key,) if self._needs_key else ()
        # A loss may return metrics beside its value.
        return jnp.sum(jax.tree.leaves(self._loss_fn(params, example, *keys))[0])

    def _mean(
        self, params: PyTree, examples: PyTree, key: PRNGKeyArray
    ) -> Float[Array, " num_canaries"]:
        count = _validate.leading_axis_size("examples", examples)
        draws = self._num_draws if self._needs_key else 1
        keys = jax.random.split(key, (count, draws))

        def of_one(row: tuple[PyTree, Array]) -> Array:
            example, keys = row
            return jnp.mean(jax.vmap(lambda key: self._scalar(params, example, key))(keys))

        return jax.lax.map(of_one, (examples, keys), batch_size=AT_ONCE)

    def along(
        self, release: PyTree, params: PyTree, examples: PyTree, key: PRNGKeyArray
    ) -> tuple[Array, Array]:
        """Returns the directional derivative of each loss, and the norm of each gradient."""
        count = _validate.leading_axis_size("examples", examples)
        keys = jax.random.split(key, count)

        def of_one(row: tuple[PyTree, Array]) -> Array:
            _, product = jax.jvp(lambda point: self._scalar(point, *row), (params,), (release,))
            return product.astype(jnp.float32)

        products = jax.lax.map(of_one, (examples, keys), batch_size=AT_ONCE)
        grads_fn = per_example_grads(self._plain(), microbatch_size=AT_ONCE)
        grads = grads_fn(params, examples, key=key if self._needs_key else None)
        return products, jnp.sqrt(grads.global_squared_norms().astype(jnp.float32))

    def _plain(self) -> Any:
        if self._needs_key:
            return self._scalar
        return lambda params, example: self._scalar(params, example, jax.random.key(0))


class _HostDataWithRows(HostData):
    """Data on the host, followed by the rows of canaries."""

    def __init__(self, data: HostData, rows: PyTree) -> None:
        self.take = data.take
        self._before, self._rows = data, rows
        self._length = len(data) + _validate.leading_axis_size("examples", rows)

    def rows(self, indices: np.ndarray) -> PyTree:
        """See `HostData.rows`."""
        count = len(self._before)
        is_canary = indices >= count
        found = self._before.rows(np.where(is_canary, 0, indices))
        own = np.where(is_canary, indices - count, 0)

        def merged(leaf: np.ndarray, rows: np.ndarray) -> np.ndarray:
            shape = (-1, *[1] * (leaf.ndim - 1))
            return np.where(is_canary.reshape(shape), rows[own].astype(leaf.dtype), leaf)

        return jax.tree.map(merged, found, self._rows)

    def first_example(self) -> PyTree:
        """See `HostData.first_example`."""
        return self._before.first_example()


def _with_rows(data: DeviceData | HostData, examples: PyTree) -> DeviceData | HostData:
    if isinstance(data, HostData):
        return _HostDataWithRows(data, examples)

    def joined(leaf: Any, rows: np.ndarray) -> Any:
        library: Any = np if isinstance(leaf, np.ndarray) else jnp
        return library.concatenate([leaf, rows.astype(leaf.dtype)])

    return DeviceData(jax.tree.map(joined, data.arrays, examples), take=data.take)


def _refuse_other_fields(examples: PyTree, first: PyTree) -> None:
    """Raises unless the canaries look like the rows of the data."""
    remedy = "Make the canaries as the data, with a leading axis of canaries."
    found: Any = jax.tree.structure(examples)
    expected: Any = jax.tree.structure(first)
    if found != expected:
        raise ValueError(
            f"input canaries must have the fields of the data, {expected}; got {found}. {remedy}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(examples), jax.tree.leaves(first), strict=True)
    for (path, leaf), row in pairs:
        name = f"examples{jax.tree_util.keystr(path)}"
        if leaf.shape[1:] != row.shape[1:]:
            raise ValueError(
                f"{name} must have rows of shape {row.shape[1:]}, as the data; got "
                f"{leaf.shape[1:]}. {remedy}"
            )
        if not np.can_cast(leaf.dtype, row.dtype, "same_kind"):
            raise ValueError(
                f"{name} must have the type of the data, {row.dtype}; got {leaf.dtype}. {remedy}"
            )
