"""Training steps in JAX: without privacy, by dpoptax, and by other JAX libraries.

Each step takes parameters, the optimizer state and a batch, and returns parameters and state. It
computes gradients, clips, adds noise to the sum, and updates with SGD.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.models import Workload, workload
from benchmarks.peers.step import CLIP, NOISE, RATE, Step
from benchmarks.timing import compiled

# Parameters, state and a batch in, updates and the next state out; and the first state. Once
# `applied`, parameters come out in place of updates.
Program = tuple[Callable[..., Any], Any]


def inputs_of(work: Workload, examples: Any) -> tuple[Any, ...]:
    """Returns the arguments of the loss after the parameters, with a leading batch axis."""
    if work.key is None:
        return (examples,)
    return (examples, jax.random.split(work.key, jax.tree.leaves(examples)[0].shape[0]))


def mean_gradient(work: Workload, params: Any, examples: Any) -> Any:
    """The gradient of the mean loss."""

    def mean_loss(params: Any) -> jax.Array:
        loss = functools.partial(work.loss_fn, params)
        return jax.vmap(loss)(*inputs_of(work, examples)).mean()

    return jax.grad(mean_loss)(params)


def plain(work: Workload, batch: int) -> Program:
    """Without privacy."""
    tx = optax.sgd(RATE)

    def step(params: Any, state: Any, examples: Any) -> Any:
        return tx.update(mean_gradient(work, params, examples), state, params)

    return step, tx.init(work.params)


def ours(work: Workload, tx: optax.GradientTransformation) -> Program:
    """Per-example gradients, and updates by `privatize` and an optimizer."""
    import dpoptax

    grads_fn = dpoptax.per_example_grads(work.loss_fn)

    def step(params: Any, state: Any, examples: Any) -> Any:
        return tx.update(grads_fn(params, examples, key=work.key), state, params)

    return step, tx.init(work.params)


def stacked(work: Workload, params: Any, examples: Any) -> Any:
    """`vmap` of `grad`."""
    inputs = inputs_of(work, examples)
    return jax.vmap(jax.grad(work.loss_fn), (None, *(0 for _ in inputs)))(params, *inputs)


def by_vmap(work: Workload, batch: int) -> Program:
    """Written by hand, as the authors of arXiv:2010.09063 do."""

    def step(params: Any, state: Any, examples: Any) -> Any:
        grads = jax.tree.leaves(stacked(work, params, examples))
        squares = sum(jnp.square(leaf).reshape(batch, -1).sum(1) for leaf in grads)
        weights = 1 / jnp.maximum(jnp.sqrt(squares) / CLIP, 1.0)
        sums = [jnp.tensordot(weights, leaf, (0, 0)) for leaf in grads]
        key, *keys = jax.random.split(state, len(sums) + 1)
        noisy = [
            (leaf + CLIP * NOISE * jax.random.normal(noise_key, leaf.shape)) / batch
            for noise_key, leaf in zip(keys, sums, strict=True)
        ]
        updates = [-RATE * leaf for leaf in noisy]
        return jax.tree.unflatten(jax.tree.structure(params), updates), key

    return step, jax.random.key(0)


def by_optax(work: Workload, batch: int) -> Program:
    """`optax.contrib.differentially_private_aggregate`."""
    private = optax.contrib.differentially_private_aggregate(CLIP, NOISE, jax.random.key(0))
    tx = optax.chain(private, optax.sgd(RATE))

    def step(params: Any, state: Any, examples: Any) -> Any:
        return tx.update(stacked(work, params, examples), state, params)

    return step, tx.init(work.params)


def by_jax_privacy(work: Workload, batch: int) -> Program:
    """`jax_privacy.clipped_grad` and its Gaussian privatizer."""
    import jax_privacy

    count = 1 if work.key is None else 2
    grad_fn = jax_privacy.clipped_grad(
        work.loss_fn,
        l2_clip_norm=CLIP,
        normalize_by=batch,
        batch_argnums=tuple(range(1, 1 + count)),
        keep_batch_dim=False,
    )
    noise = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=NOISE * grad_fn.sensitivity(), prng_key=jax.random.key(0)
    )
    tx = optax.chain(noise, optax.sgd(RATE))

    def step(params: Any, state: Any, examples: Any) -> Any:
        return tx.update(grad_fn(params, *inputs_of(work, examples)), state, params)

    return step, tx.init(work.params)


def programs() -> dict[str, Callable[[Workload, int], Program]]:
    """By peer."""

    def private(work: Workload, batch: int, *, chacha20: bool) -> Program:
        import dpoptax

        key = dpoptax.random.insecure_key(0, rounds=20) if chacha20 else jax.random.key(0)
        return ours(
            work,
            dpoptax.dp_sgd(RATE, CLIP, noise_multiplier=NOISE, expected_batch_size=batch, key=key),
        )

    return {
        "jax": plain,
        "dpoptax": functools.partial(private, chacha20=False),
        "dpoptax_chacha20": functools.partial(private, chacha20=True),
        "vmap": by_vmap,
        "optax": by_optax,
        "jax_privacy": by_jax_privacy,
    }


def step_of(peer: str, work: Workload, batch: int) -> Program:
    """Returns the step of a peer."""
    return applied(*programs()[peer](work, batch))


def applied(update: Callable[..., Any], state: Any) -> Program:
    """Returns a step from parameters, state and examples to the first two."""

    def step(params: Any, state: Any, examples: Any) -> Any:
        updates, state = update(params, state, examples)
        return optax.apply_updates(params, updates), state

    return step, state


def maker(peer: str) -> Callable[[str, int], Step]:
    """See `worker.maker`."""

    def make(model: str, batch: int) -> Step:
        work = workload(model, batch)
        step, state = step_of(peer, work, batch)
        (program, _), facts = compiled(step, (work.params, state, work.examples))

        def run(steps: int) -> None:
            carry = work.params, state
            for _ in range(steps):
                carry = program(*carry, work.examples)
            jax.block_until_ready(carry)

        parameters = sum(leaf.size for leaf in jax.tree.leaves(work.params))
        return Step(run, parameters, **facts)

    return make


def versions(peer: str) -> dict[str, str]:
    """Of what matters, and the device."""
    names = ["jax", "jaxlib", "flax", "optax"]
    names += ["jax-privacy"] if peer == "jax_privacy" else ["dpoptax"]
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"device": jax.devices()[0].device_kind}
