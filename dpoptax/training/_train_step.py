"""One private training step, a pure function that can be jitted."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.clipping._flat import as_clip_rule
from dpoptax.clipping._state import AnyClipRule
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._api import deferred_values_and_grads
from dpoptax.per_example._parts import check_divides, shards_of
from dpoptax.per_example._validate_loss import takes_key
from dpoptax.samplers import Sampler, take
from dpoptax.samplers import take as gather
from dpoptax.schedules import ScalarOrSchedule
from dpoptax.training._audited import AuditedBatch, RunAudit, num_without_rows
from dpoptax.training._check_size import check_size
from dpoptax.training._data import Take, take_plain
from dpoptax.training._diagnostics import nonprivate_nonfinite, nonprivate_norms, rule_of_step
from dpoptax.training._noise_binding import bind_noise
from dpoptax.training._objective import Objective, split_objective
from dpoptax.training._program_digest import take_over_digest
from dpoptax.training._usual_size import usual_size
from dpoptax.training._validate_optimizer import check_transformation
from dpoptax.transforms._private import gradient_point


class TrainState(NamedTuple):
    """All that the next step needs. It contains keys: do not publish it.

    Attributes:
        step: how many steps were done.
        params: the parameters after them.
        opt_state: of the private transformation and the optimizer.
        sampler_state: of the sampler.
        model_key: the key from which the loss of every step gets its own.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> key = jax.random.key(0)
        >>> state = TrainState(jnp.array(3), {"w": jnp.zeros(2)}, (), (), key)
        >>> state  # the printed state has no keys
        TrainState(step=3, ...)
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: optax.OptState
    sampler_state: PyTree
    model_key: PRNGKeyArray

    def __repr__(self) -> str:
        """Leaves out the keys, which must not appear in logs and error messages."""
        return f"TrainState(step={self.step}, params={self.params}, <states and keys not shown>)"


class StepInfo(NamedTuple):
    """Diagnostics of one step. Not private: they come from the data, without noise.

    Attributes:
        nonprivate_loss: the mean loss of the examples in the batch, zero for an empty batch.
        nonprivate_batch_size: how many examples the batch has.
        nonprivate_clip_fraction: the fraction of them whose gradients were scaled down, in at least
            one group of parameters, or left out because they are not finite; NaN unless
            `make_train_step` has `diagnostics`.
        nonprivate_median_norm: the median norm of their gradients before clipping; NaN unless
            `make_train_step` has `diagnostics`.
        nonprivate_nonfinite_count: how many examples of the batch have a loss that is not finite,
            or, with `diagnostics`, a gradient that is not finite. A gradient that is not finite
            contributes nothing.
        nonprivate_aux: the means over the batch of what the loss returns beside its value, zero for
            an empty batch; None unless `make_train_step` has `has_aux`.

    Example:
        >>> info = StepInfo(0.5, 8, 0.25, 1.1, 0)
        >>> info.nonprivate_batch_size  # print such numbers, and do not publish them
        8
    """

    nonprivate_loss: Float[Array, ""]
    nonprivate_batch_size: Int[Array, ""]
    nonprivate_clip_fraction: Float[Array, ""]
    nonprivate_median_norm: Float[Array, ""]
    nonprivate_nonfinite_count: Int[Array, ""]
    nonprivate_aux: PyTree = None


TrainStep = Callable[[TrainState, PyTree], tuple[TrainState, StepInfo]]


def init_state(
    params: PyTree,
    *,
    tx: optax.GradientTransformation,
    sampler: Sampler,
    sampling_key: PRNGKeyArray,
    model_key: PRNGKeyArray,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        params: the initial parameters.
        tx: `privatize` chained with an optimizer.
        sampler: the sampler of the batches.
        sampling_key: a key for the sampler only.
        model_key: a key for the loss only (dropout, latent draws).

    Returns:
        A `TrainState` at step 0.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> keys = dpoptax.random.split_by_purpose(jax.random.key(0))
        >>> state = init_state(
        ...     {"w": jnp.zeros(2)},
        ...     tx=dpoptax.dp_sgd(
        ...         0.1, 1.0, noise_multiplier=1.1, expected_batch_size=8, key=keys.noise_key
        ...     ),
        ...     sampler=dpoptax.samplers.Poisson(100, 8),
        ...     sampling_key=keys.sampling_key,
        ...     model_key=keys.model_key,
        ... )
        >>> int(state.step)
        0
    """
    check_transformation("tx", tx)
    opt_state = tx.init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=bind_noise(opt_state, (params, opt_state), program="the initial state"),
        sampler_state=sampler.init(sampling_key),
        model_key=model_key,
    )


@answer_foreign_names
def make_train_step(
    loss_fn: Callable[..., Float[Array, ""]] | Objective,
    *,
    tx: optax.GradientTransformation,
    sampler: Sampler,
    take: Take = take,
    microbatch_size: int | None = None,
    diagnostics: AnyClipRule | ScalarOrSchedule | None = None,
    has_aux: bool = False,
    audit: RunAudit | None = None,
) -> TrainStep:
    """Returns one private step: sample, gather, per-example gradients, update.

    The noise key of each step is derived from that of the step before, the gradient of the loss,
    the update of `tx`, and the examples of the batch. So a state that continues with another loss
    or optimizer draws other noise at once. With other data it does so from the first batch that
    differs.

    Args:
        loss_fn: the loss of one example, `loss_fn(params, example)`, or
            `loss_fn(params, example, key)` if it needs randomness; or an `Objective`.
        tx: `privatize` chained with an optimizer; for an objective, `objective.wrap(privatize)`
            chained with an optimizer. The optimizers of `dpoptax.transforms` need its `chain`.
        sampler: the sampler of the batches, the one that `tx` was scaled for.
        take: `take(data, batch)` returns the examples of a batch, with a leading axis of
            max_batch_size: `MaskedExamples`, or plain arrays, to which the step applies
            `batch.mask`. `dpoptax.samplers.sharded_take` spreads them over several devices.
        microbatch_size: as in `dpoptax.per_example_grads`; noise is still added once per step.
        diagnostics: the clip rule of `tx`, to add the clipped fraction and the median norm to the
            `StepInfo`. They are not private.
        has_aux: the loss returns a pair `(loss, metrics)`, and the `StepInfo` gets the means of the
            metrics over the batch. They are not private.
        audit: for `fit` only: an audit that has started, whose state is in that of `tx`.

    Returns:
        `step(state, data) -> (state, StepInfo)`, pure; `data` is a tree of arrays with a leading
        axis of num_examples, which is checked unless `take` is your own. Jit it, or scan it.

    Example:
        >>> import jax, jax.numpy as jnp, dpoptax
        >>> keys = dpoptax.random.split_by_purpose(jax.random.key(0))
        >>> run = dict(
        ...     tx=dpoptax.dp_sgd(
        ...         0.1, 1.0, noise_multiplier=1.1, expected_batch_size=8, key=keys.noise_key
        ...     ),
        ...     sampler=dpoptax.samplers.Poisson(100, 8),
        ... )
        >>> step = make_train_step(lambda w, x: (w - x) ** 2, **run)
        >>> state = init_state(jnp.array(0.0), sampling_key=keys[0], model_key=keys[2], **run)
        >>> state, info = jax.jit(step)(state, jnp.ones(100))
        >>> int(state.step)
        1
    """
    check_transformation("tx", tx)
    loss_of, point_of = split_objective(loss_fn)
    # Another part of an objective may train a parameter that its loss leaves out.
    grads_fn = deferred_values_and_grads(
        loss_of,
        microbatch_size=microbatch_size,
        shards=_known_shards(take, sampler.max_batch_size, microbatch_size),
        has_aux=has_aux,
        allow_unused=isinstance(loss_fn, Objective),
        usual_size=usual_size(sampler),
    )
    needs_key = takes_key(loss_of)
    clip = None if diagnostics is None else as_clip_rule(diagnostics)

    program_digest = take_over_digest(loss_fn, tx)

    def step(state: TrainState, data: PyTree) -> tuple[TrainState, StepInfo]:
        if take is gather:  # another `take` may get the rows of one batch, or any structure
            extra = num_without_rows(audit, state.opt_state)
            check_size(_validate.leading_axis_size("data", data), sampler, extra)
        sampler_state, batch = sampler.sample(state.sampler_state)
        key = jax.random.fold_in(state.model_key, state.step) if needs_key else None
        # Some objectives and optimizers take the gradient at a point from the optimizer state, not
        # at the parameters. The update is applied to the parameters in any case.
        point = point_of(gradient_point(tx, state.params, state.opt_state), state.opt_state)
        drawn = AuditedBatch(batch, audit, state.opt_state, sampler.num_examples)
        examples, taken = take_plain(take, data, drawn.of_data)
        batch = drawn.contributing(taken)
        values, grads = grads_fn(point, examples, mask=batch.mask, key=key)
        program, captured = program_digest(point, examples, key, state.params, state.opt_state)
        opt_state = bind_noise(
            state.opt_state, (batch.indices, examples), program=program, mask=batch.mask
        )
        # The gradients also depend on the keys of the loss, and on what it captured.
        unbatched = [*captured, *([] if key is None else [key])]
        if unbatched:
            opt_state = bind_noise(opt_state, unbatched, program="captured")
        updates, opt_state = tx.update(drawn.insert(grads), opt_state, state.params)
        # After the update: microbatches have the losses from the pass that clips and sums.
        losses, aux = drawn.values(values() if has_aux else (values(), None), taken)
        now = None if clip is None else rule_of_step(clip, state.opt_state)
        info = _info(losses, aux, grads, taken.mask, now, state.step)
        next_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            sampler_state=sampler_state,
            model_key=state.model_key,
        )
        return next_state, info

    return step


def _known_shards(take: Take, batch: int, microbatch_size: int | None) -> int | None:
    """Returns how many devices share a batch, if `take` says so; None if it does not."""
    shards = shards_of(getattr(take, "sharding", None), batch)
    if shards is not None and microbatch_size is not None and 0 < microbatch_size < batch:
        check_divides(microbatch_size, shards)
    return shards


def _info(
    losses: Array,
    aux: PyTree,
    grads: PerExampleGrads,
    mask: Array,
    clip: ClipRule | None,
    step: Array,
) -> StepInfo:
    size = jnp.sum(mask, dtype=jnp.int32)
    clip_fraction = median = jnp.full((), jnp.nan, jnp.float32)
    if clip is not None:
        clip_fraction, median = nonprivate_norms(grads, clip, step, mask)
    return StepInfo(
        nonprivate_loss=_mean(losses, size),
        nonprivate_batch_size=size,
        nonprivate_clip_fraction=clip_fraction,
        nonprivate_median_norm=median,
        nonprivate_nonfinite_count=nonprivate_nonfinite(
            losses, mask, None if clip is None else grads
        ),
        nonprivate_aux=jax.tree.map(lambda leaf: _mean(leaf, size), aux),
    )


def _mean(values: Array, size: Int[Array, ""]) -> Array:
    """The mean over the real examples of a batch; padded rows are zero."""
    total = jnp.sum(values, axis=0, dtype=jnp.result_type(values, jnp.float32))
    return total / jnp.maximum(size, 1).astype(total.dtype)
