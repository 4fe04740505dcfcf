"""Costs of augmentation: a private gradient with K views, beside a plain one of K times the batch.

    python -m benchmarks.views [--batch 64] [--views 2 4 8] [model ...]

Both draw the same views. The plain one is the gradient of the mean loss over all of them. It prints
the ratio of the multiplications of products and convolutions in the compiled programs, and the
ratios of wall-clock and processor time: medians over rounds that run one after the other.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import dpoptax
from benchmarks.models import Workload, workload
from benchmarks.program_costs import costs

MODELS = ("fcnn", "mnist", "transformer")


def augment(key: jax.Array, example: Any) -> Any:
    """Noise for images and rows of numbers, a shift for texts."""
    x, y = example
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x + 0.01 * jax.random.normal(key, x.shape), y
    return jnp.roll(x, jax.random.randint(key, (), 0, 3)), y


def programs(work: Workload, num_views: int) -> dict[str, Callable[..., Any]]:
    """The two gradients, as functions of parameters and a batch without views."""
    grads_fn = dpoptax.per_example_grads(dpoptax.average_views(work.loss_fn, augment, num_views))
    clip = dpoptax.clipping.FlatClip(1.0)

    def private(params: Any, examples: Any, key: jax.Array) -> Any:
        return grads_fn(params, examples, key=key).clip_and_sum(clip.weights)

    def plain(params: Any, examples: Any, key: jax.Array) -> Any:
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, num_views, axis=0), examples)
        keys = jax.random.split(key, len(jax.tree.leaves(repeated)[0]))
        views = jax.vmap(augment)(keys, repeated)
        losses = jax.vmap(work.loss_fn, (None, 0))
        return jax.grad(lambda params: jnp.mean(losses(params, views)))(params)

    return {"private": private, "plain": plain}


def measure(name: str, batch: int, views: Sequence[int], rounds: int) -> None:
    """Prints a line for each number of views."""
    work, key = workload(name, batch), jax.random.key(0)
    arguments = (work.params, work.examples, key)
    compiled = {
        (count, kind): jax.jit(function).lower(*arguments).compile()
        for count in views
        for kind, function in programs(work, count).items()
    }
    seconds: dict[Any, list[tuple[float, float]]] = {case: [] for case in compiled}
    for number in range(rounds + 1):
        for case, program in compiled.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*arguments))
            reading = time.perf_counter() - wall, time.process_time() - processor
            if number:  # the first round warms up
                seconds[case].append(reading)
    for count in views:
        private, plain = (compiled[count, kind] for kind in ("private", "plain"))
        flop = costs(private.as_text())["flop"] / costs(plain.as_text())["flop"]
        pairs = list(zip(seconds[count, "private"], seconds[count, "plain"], strict=True))
        wall, processor = (
            statistics.median(ours[i] / theirs[i] for ours, theirs in pairs) for i in range(2)
        )
        print(f"{name}, {count} views: FLOP {flop:.3f}, wall {wall:.2f}, processor {processor:.2f}")


def main() -> None:
    """Measures the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for name in options.models:
        measure(name, options.batch, options.views, options.rounds)


if __name__ == "__main__":
    main()
