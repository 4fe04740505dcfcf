"""Times one private gradient with and without vmap, with and without jit, and factored.

    python -m benchmarks.ablation --out results.json

As in Table 2 of "Enabling Fast Differentially Private SGD via Just-in-Time Compilation and
Vectorization" (arXiv:2010.09063), with one more column for factored gradients. Without vmap,
examples go through Python one by one.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import dpoptax
from benchmarks import results
from benchmarks.models import Workload, workload
from benchmarks.timing import interleaved

MODELS = ("logistic", "fcnn", "mnist", "cifar", "embedding")


def weight(grads: Any) -> jax.Array:
    """What brings one example's gradient to norm 1 or below."""
    norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(grads)))
    return 1 / jnp.maximum(norm, 1.0)


def variants(work: Workload) -> dict[str, Callable[[Any, Any], Any]]:
    """Clipped sums of the gradients of a batch, as functions of parameters and examples."""

    def one(params: Any, example: Any) -> Any:
        grads = jax.grad(work.loss_fn)(params, example)
        return jax.tree.map(functools.partial(jnp.multiply, weight(grads)), grads)

    def in_turn(one: Callable[..., Any], params: Any, examples: Any) -> Any:
        size = jax.tree.leaves(examples)[0].shape[0]
        total = jax.tree.map(jnp.zeros_like, params)
        for index in range(size):
            example = jax.tree.map(lambda leaf, index=index: leaf[index], examples)
            total = jax.tree.map(jnp.add, total, one(params, example))
        return total

    def by_vmap(params: Any, examples: Any) -> Any:
        # Summed as a product: XLA adds large gradients along their first axis slowly on a CPU.
        grads = jax.vmap(jax.grad(work.loss_fn), (None, 0))(params, examples)
        weights = jax.vmap(weight)(grads)
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), grads)

    def factored(params: Any, examples: Any) -> Any:
        rule = dpoptax.clipping.FlatClip(1.0)
        return dpoptax.per_example_grads(work.loss_fn)(params, examples).clip_and_sum(rule.weights)

    return {
        "neither": functools.partial(in_turn, one),
        "vmap": by_vmap,
        "jit": functools.partial(in_turn, jax.jit(one)),
        "vmap and jit": jax.jit(by_vmap),
        "dpoptax": jax.jit(factored),
    }


def cells_of(model: str, batch: int, rounds: int) -> results.Cells:
    """Readings of every variant, and the seconds of its first run, which compiles what it can."""
    work = workload(model, batch)
    arguments = (work.params, work.examples)
    programs, cells = {}, {}
    for name, function in variants(work).items():
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        cells[name] = {"start_seconds": time.perf_counter() - began}
        programs[name] = (function, arguments)
    for name, seconds in interleaved(programs, rounds).items():
        cells[name]["seconds"] = seconds
    return cells


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    results.study(
        {
            f"{model}, {options.batch}": functools.partial(
                cells_of, model, options.batch, options.rounds
            )
            for model in MODELS
        },
        options.out,
    )


if __name__ == "__main__":
    main()
