"""State and data in, state and readings out: one private step, pure and jittable."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax.clipping import ClipRule
from dpoptax.clipping._flat import as_clip_rule
from dpoptax.per_example import value_and_per_example_grads
from dpoptax.per_example._validate_loss import takes_key
from dpoptax.samplers import Batch, Sampler, take
from dpoptax.schedules import Scheduled
from dpoptax.training._diagnostics import nonprivate_norms
from dpoptax.training._objective import Objective


class TrainState(NamedTuple):
    """What the next step needs."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: optax.OptState
    sampler_state: PyTree
    model_key: PRNGKeyArray


class StepInfo(NamedTuple):
    """Readings for people. Not private: computed from the data, without noise.

    Attributes:
        nonprivate_loss: mean loss of the examples that took part, zero for an empty batch.
        nonprivate_batch_size: how many took part.
        nonprivate_clip_fraction: the share of them whose gradients were scaled down, or left out
            because they are not finite; NaN unless `watch` is given.
        nonprivate_median_norm: of their gradients, before clipping; likewise.
    """

    nonprivate_loss: Float[Array, ""]
    nonprivate_batch_size: Int[Array, ""]
    nonprivate_clip_fraction: Float[Array, ""]
    nonprivate_median_norm: Float[Array, ""]


# From data and a batch to its examples.
Take = Callable[[PyTree, Batch], PyTree]
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
        sampler: who takes part in each step.
        sampling_key: a key for the sampler and nothing else.
        model_key: a key for the loss (dropout, latent draws) and nothing else.

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
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        sampler_state=sampler.init(sampling_key),
        model_key=model_key,
    )


def make_train_step(
    loss_fn: Callable[..., Float[Array, ""]] | Objective,
    *,
    tx: optax.GradientTransformation,
    sampler: Sampler,
    take: Take = take,
    microbatch_size: int | None = None,
    watch: ClipRule | Scheduled | None = None,
) -> TrainStep:
    """Returns one private step: sample, take, per-example gradients, update.

    Args:
        loss_fn: the loss of one example, `loss_fn(params, example)`, or
            `loss_fn(params, example, key)` for one that draws; or an `Objective`.
        tx: `privatize` chained with an optimizer; with an objective, `objective.wrap(privatize)`
            chained with an optimizer.
        sampler: who takes part; the one that `tx` was scaled for.
        take: `take(data, batch)`, the examples of a batch with a leading axis of max_batch_size;
            `dpoptax.samplers.take` by default. One of your own may place them on a mesh.
        microbatch_size: as in `dpoptax.per_example_grads`; noise is added once all the same.
        watch: the clip of `tx`, for readings of the norms under it; they are not private.

    Returns:
        `step(state, data) -> (state, StepInfo)`, pure; `data` is a tree of arrays with a leading
        axis of num_examples. Jit it, or scan it.

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
    objective = loss_fn if isinstance(loss_fn, Objective) else None
    loss_of = loss_fn.loss if isinstance(loss_fn, Objective) else loss_fn
    grads_fn = value_and_per_example_grads(loss_of, microbatch_size=microbatch_size)
    needs_key = takes_key(loss_of)
    watched = None if watch is None else as_clip_rule(watch)

    def step(state: TrainState, data: PyTree) -> tuple[TrainState, StepInfo]:
        sampler_state, batch = sampler.sample(state.sampler_state)
        key = jax.random.fold_in(state.model_key, state.step) if needs_key else None
        point = (
            objective.gradient_point(state.params, state.opt_state) if objective else state.params
        )
        losses, grads = grads_fn(point, take(data, batch), mask=batch.mask, key=key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        size = jnp.sum(batch.mask, dtype=jnp.int32)
        share = median = jnp.full((), jnp.nan, jnp.float32)
        if watched is not None:
            share, median = nonprivate_norms(grads, watched, state.step)
        info = StepInfo(
            nonprivate_loss=jnp.sum(losses) / jnp.maximum(size, 1).astype(losses.dtype),
            nonprivate_batch_size=size,
            nonprivate_clip_fraction=share,
            nonprivate_median_norm=median,
        )
        next_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            sampler_state=sampler_state,
            model_key=state.model_key,
        )
        return next_state, info

    return step
