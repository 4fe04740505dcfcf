"""The two halves of a step for a loop that computes its gradients itself: sample, then apply."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dpoptax._pytree import PyTree
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._stacked import as_per_example_grads
from dpoptax.samplers import Batch, Sampler
from dpoptax.training._data import Take, take_plain
from dpoptax.training._noise_binding import bind_noise, digest
from dpoptax.training._program_digest import ProgramDigest
from dpoptax.training._train_step import TrainState
from dpoptax.transforms._privatize import PrivatizeState

# What was released under each noise key in this process, as digests.
_releases: dict[bytes, bytes] = {}


def make_sampling_step(sampler: Sampler, take: Take) -> Callable[..., Any]:
    """Returns `step(state, data)`, which draws a batch and changes the sampler state only."""

    def step(state: TrainState, data: PyTree) -> tuple[TrainState, tuple[Batch, PyTree]]:
        sampler_state, batch = sampler.sample(state.sampler_state)
        examples, batch = take_plain(take, data, batch)
        return state._replace(sampler_state=sampler_state), (batch, examples)

    return step


class Update:
    """Applies per-example gradients of a batch to the state of a run."""

    def __init__(self, tx: optax.GradientTransformation, program: ProgramDigest) -> None:
        def update(
            state: TrainState, batch: Batch, examples: PyTree, grads: PyTree
        ) -> tuple[TrainState, Array, Array]:
            found = check_gradients(grads, batch, state.params)
            # Gradients of padded rows are left out also if the caller forgot the mask.
            masked: PyTree = dataclasses.replace(found, mask=found.mask & batch.mask)  # type: ignore[type-var]
            text, _ = program(state.params, examples, None, state.params, state.opt_state)
            bound = bind_noise(
                state.opt_state, (batch.indices, examples), program=text, mask=batch.mask
            )
            updates, opt_state = tx.update(masked, bound, state.params)
            next_state = TrainState(
                step=state.step + 1,
                params=optax.apply_updates(state.params, updates),
                opt_state=opt_state,
                sampler_state=state.sampler_state,
                model_key=state.model_key,
            )
            # An optimizer may show what was released in its state before it moves anything.
            words = digest((updates, opt_state), jnp.zeros(2, jnp.uint32))
            return next_state, _noise_keys(opt_state), jnp.stack(words)

        self._update = jax.jit(update)

    def __call__(
        self, state: TrainState, batch: Batch, examples: PyTree, grads: PyTree
    ) -> TrainState:
        """Returns the next state.

        Raises:
            ValueError: the gradients are of another batch; or in this process other gradients were
                released with the same noise.
        """
        state, keys, words = self._update(state, batch, examples, grads)
        name, found = np.asarray(keys).tobytes(), np.asarray(words).tobytes()
        # The program of these gradients is unknown, so their noise is not bound to it.
        if _releases.setdefault(name, found) != found:
            raise ValueError(
                "expected another key for a run with other gradients; got a key that a run in this "
                "process used already, and the difference of both would have no noise. Leave the "
                "key out, or pass another one: jax.random.fold_in(key, 1)."
            )
        return jax.block_until_ready(state)


def check_gradients(grads: PyTree, batch: Batch, params: PyTree) -> PerExampleGrads:
    """Returns per-example gradients; refuses those of another batch or other parameters."""
    found = as_per_example_grads(grads, params)
    if found.mask.shape != batch.mask.shape:
        raise ValueError(
            f"expected gradients of the {len(batch.mask)} rows of the last batch, padded rows "
            f"included; got gradients of {found.mask.shape[0]} rows. Pass the per-example "
            "gradients of the examples that sample returned."
        )
    return found


def _noise_keys(opt_state: optax.OptState) -> Array:
    """Returns the words of all noise keys in a state."""
    is_private = lambda node: isinstance(node, PrivatizeState)  # noqa: E731
    states = filter(is_private, jax.tree.leaves(opt_state, is_leaf=is_private))
    return jnp.concatenate([jax.random.key_data(state.key).reshape(-1) for state in states])
