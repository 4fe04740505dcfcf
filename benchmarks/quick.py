"""Writes one table of what the defaults cost: `make bench-quick`, twelve minutes.

    python -m benchmarks.quick --out out/quick.json
    python -m benchmarks.compare docs/benchmarks/cpu/quick.json out/quick.json

"Defaults" is a step of `training.fit` as it comes: Poisson batches, padded as the plan pads them,
and a secure key. "Private" is a step of `dp_sgd` with JAX's default keys on full batches that are
given. "Not private" is a loop over full batches of a permutation, in Python or on the device,
whichever is faster. Compilation is left out. Each round times all three, one after the other; a row
ends after seven rounds, or when its time is over but not before three. The first rows are the noise
of the VAE by generator. Numbers are medians, and the mean over models is geometric. Three models
take seconds per step at batch 1,024. Those rows need `--slow`.
"""

import argparse
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpoptax
from benchmarks import randomness, results
from benchmarks.models import PARAMETER_COUNTS, workload
from benchmarks.peers import jax_steps
from benchmarks.timing import compiled, interleaved, read
from benchmarks.training import seconds_per_step_of_fit

MODELS = [name for name in PARAMETER_COUNTS if name != "lora"]
BATCHES = (128, 1024)
# Their steps take seconds at the larger batch: twelve minutes would not be enough.
SLOW = ("cifar", "lstm", "transformer")
ROUNDS, LEAST_ROUNDS = 7, 3
# A row takes this long, apart from compilation, and a reading a seventh of a third of it.
ROW_SECONDS = 25.0
RATE = 1e-3


def plain_loops(work: Any, num_examples: int, batch: int) -> Callable[[int], float]:
    """Returns a function that trains for some steps, and returns the seconds of one."""
    optimizer = optax.adam(RATE)
    order = jax.random.permutation(jax.random.key(0), num_examples)

    def step(state: Any, data: Any) -> Any:
        params, opt_state, count = state
        start = count * batch % (num_examples - batch + 1)
        rows = jax.lax.dynamic_slice(order, (start,), (batch,))
        examples = jax.tree.map(lambda leaf: leaf[rows], data)
        gradient = jax_steps.mean_gradient(work, params, examples)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, count + 1

    def looped(state: Any, data: Any, steps: jax.Array) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, state: step(state, data), state)

    start = (work.params, optimizer.init(work.params), jnp.zeros((), jnp.int32))
    one, many = jax.jit(step), jax.jit(looped)

    def in_python(steps: int) -> None:
        state = start
        for _ in range(steps):
            state = one(state, work.examples)
        jax.block_until_ready(state)

    def on_device(steps: int) -> None:
        jax.block_until_ready(many(start, work.examples, jnp.asarray(steps)))

    def seconds(loop: Callable[[int], None], steps: int) -> float:
        began = time.perf_counter()
        loop(steps)
        return (time.perf_counter() - began) / steps

    for loop in (in_python, on_device):
        loop(2)
    fastest = min((in_python, on_device), key=lambda loop: seconds(loop, 3))
    return functools.partial(seconds, fastest)


def row(name: str, batch: int, row_seconds: float) -> results.Cells:
    """Seconds per step of a model: by defaults, private and not private."""
    num_examples = max(4096, 4 * batch)
    work = workload(name, num_examples)
    plain = plain_loops(work, num_examples, batch)
    reading = row_seconds / ROUNDS / 3
    # A loop of fewer steps than these has too few progress calls to be timed.
    steps = min(20_000, max(6, int(reading / plain(3))))
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(num_examples, batch),
        clip=1.0,
        noise_multiplier=1.0,
        num_steps=steps,
        delta=1e-5,
    )
    given = work._replace(examples=jax.tree.map(lambda leaf: leaf[:batch], work.examples))
    update, state = jax_steps.step_of("dpoptax", given, batch)
    private, _ = compiled(jax.jit(update), (given.params, state, given.examples))

    def defaults() -> float:
        return seconds_per_step_of_fit(
            work.loss_fn, work.params, work.examples, plan, optax.adam(RATE), key=None
        )

    defaults()  # compiles
    once = read(*private, 1)
    readings: dict[str, Callable[[], float]] = {
        "not private": lambda: plain(steps),
        "private": lambda: read(*private, max(1, int(reading / 4 / once))),
        "defaults": defaults,
    }
    found: dict[str, list[float]] = {kind: [] for kind in readings}
    ends = time.perf_counter() + row_seconds
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() > ends:
            break
        for kind, take in readings.items():
            found[kind].append(take())
    return {kind: {"seconds": seconds} for kind, seconds in found.items()}


def noise() -> results.Cells:
    """Seconds of the noise of the VAE, by generator."""
    ready = {
        generator: compiled(*randomness.programs(generator)["noise of a release"])[0]
        for generator in randomness.KEYS
    }
    found = interleaved(ready, 4 * ROUNDS)
    return {generator: {"seconds": seconds} for generator, seconds in found.items()}


def summary(record: dict[str, Any]) -> str:
    """Returns the geometric means of the ratios of all models of a batch size."""
    lines = []
    for batch in BATCHES:
        for kind in ("private", "defaults"):
            ratios = [
                over
                for title, cells in record["cells"].items()
                if title.endswith(f", {batch}")
                and (over := results.ratio(cells, kind, "not private")) is not None
            ]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                lines.append(f"- {kind}, batch {batch}: {mean:.2f}× over {len(ratios)} models")
    return "\n".join(
        ["Geometric means over models, in units of the step without privacy:", "", *lines]
    )


def main() -> None:
    """Measures, prints the table and the means, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=float, default=ROW_SECONDS, help="of a row [25]")
    parser.add_argument("--slow", action="store_true", help="also slow models at large batches")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    measurements: dict[str, Callable[[], results.Cells]] = {"noise": noise}
    for batch in options.batches:
        for name in options.models:
            if name in SLOW and batch > min(BATCHES) and not options.slow:
                continue
            measurements[f"{name}, {batch}"] = functools.partial(row, name, batch, options.seconds)
    with jax.numpy_dtype_promotion("standard"):
        record = results.study(measurements, options.out)
    print(summary(record))


if __name__ == "__main__":
    main()
