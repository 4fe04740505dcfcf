"""Times epochs of the MNIST VAE by batch size: private, and without privacy in two ways.

    python -m benchmarks.epoch --batches 128 512 --rounds 7 --out results.json

A step draws its batch on the device, draws black-and-white pixels, and updates with Adam. "Not
private" takes exactly the batch size from a permutation. "Same batches" takes Poisson batches,
padded as a plan pads them, as "private" does, so it shows what privacy costs apart from padding.
"Private, fixed size" draws exactly the batch size, as d3p does. Each round times all programs one
after the other. Printed numbers are medians over rounds. The data are random; this does not change
the time.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpoptax
from benchmarks import results
from benchmarks.timing import Program, compiled, interleaved
from dpoptax import samplers
from dpoptax.vi.models import DenseVAE, bernoulli_vae_loss

NUM_EXAMPLES = 60_000
GENERATORS = {"threefry": jax.random.key, "chacha8": dpoptax.random.insecure_key}
MODEL = DenseVAE()
LOSS = bernoulli_vae_loss(MODEL, redraw=True)


def private(batch: int, key: Any, sampler: Any) -> tuple[Callable[..., Any], Any]:
    """A step of `training.fit`, and its state."""
    keys = dpoptax.random.split_by_purpose(key)
    tx = optax.chain(
        dpoptax.privatize(10.0, 1.5, expected_batch_size=batch, key=keys.noise_key),
        optax.adam(1e-3),
    )
    step = dpoptax.training.make_train_step(LOSS, tx=tx, sampler=sampler)
    state = dpoptax.training.init_state(
        MODEL.init(jax.random.key(0), jnp.zeros(784))["params"],
        tx=tx,
        sampler=sampler,
        sampling_key=keys.sampling_key,
        model_key=keys.model_key,
    )
    return lambda state, images: step(state, images)[0], state


def poisson_of_plan(batch: int) -> samplers.Sampler:
    """Poisson batches of the padded size that a plan chooses."""
    plan = dpoptax.Plan(
        sampler=samplers.Poisson(NUM_EXAMPLES, batch),
        clip=10.0,
        noise_multiplier=1.5,
        epochs=20,
        delta=1e-5,
    )
    return plan.sampler


def plain(batch: int, *, padded: bool) -> tuple[Callable[..., Any], Any]:
    """A step without clipping and noise, and its state; with JAX's default generator."""
    optimizer = optax.adam(1e-3)
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    sampler = poisson_of_plan(batch)
    order = jax.random.permutation(keys.sampling_key, NUM_EXAMPLES)

    def step(state: Any, images: Any) -> Any:
        params, opt_state, sampler_state, count = state
        if padded:
            sampler_state, drawn = sampler.sample(sampler_state)
            examples, mask = samplers.take(images, drawn).examples, drawn.mask
        else:
            start = count * batch % (NUM_EXAMPLES - batch)
            examples = images[jax.lax.dynamic_slice(order, (start,), (batch,))]
            mask = jnp.ones(batch, bool)
        model_keys = jax.random.split(jax.random.fold_in(keys.model_key, count), len(mask))

        def mean_loss(params: Any) -> jax.Array:
            losses = jax.vmap(LOSS, (None, 0, 0))(params, examples, model_keys)
            return jnp.sum(jnp.where(mask, losses, 0.0)) / batch

        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, sampler_state, count + 1

    params = MODEL.init(jax.random.key(0), jnp.zeros(784))["params"]
    state = (params, optimizer.init(params), sampler.init(keys.sampling_key), jnp.zeros((), int))
    return step, state


def cells(batch: int, *, rounds: int, steps: int, generator: str) -> results.Cells:
    """Returns the seconds of an epoch of each program."""
    keys = jax.random.split(GENERATORS[generator](0))
    fixed_size = samplers.FixedSize(NUM_EXAMPLES, batch)
    programs = {
        "private": private(batch, keys[0], poisson_of_plan(batch)),
        "private, fixed size": private(batch, keys[1], fixed_size),
        "same batches": plain(batch, padded=True),
        "not private": plain(batch, padded=False),
    }
    images = jax.random.uniform(jax.random.key(1), (NUM_EXAMPLES, 784))
    ready: dict[str, Program] = {}
    for name, (step, state) in programs.items():

        def several(state: Any, images: Any, step: Any = step) -> Any:
            return jax.lax.fori_loop(0, steps, lambda _, state: step(state, images), state)

        ready[name], _ = compiled(several, (state, images))
    epoch = NUM_EXAMPLES / batch / steps
    return {
        name: {"seconds": [epoch * seconds for seconds in readings]}
        for name, readings in interleaved(ready, rounds).items()
    }


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="per reading [60]")
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS))
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    with jax.numpy_dtype_promotion("standard"):
        results.study(
            {
                f"{generator}, {batch}": functools.partial(
                    cells, batch, rounds=options.rounds, steps=options.steps, generator=generator
                )
                for generator in options.generators
                for batch in options.batches
            },
            options.out,
        )


if __name__ == "__main__":
    main()
