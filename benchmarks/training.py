"""Times `training.fit` next to the bare jitted step, and a checkpoint.

    python -m benchmarks.training --rounds 5 --out results.json

`fit` is timed from the first progress call, when its program is compiled, to the last one. The bare
step runs in a Python loop and in a loop on the device. Rounds are interleaved, and printed numbers
are medians.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpoptax
from benchmarks import results
from benchmarks.models import workload
from dpoptax.training import Progress, TrainState, fit, init_state, make_train_step
from dpoptax.training._resume.checkpoints import RunFolder
from dpoptax.training._resume.settings import Checkpoints

NUM_EXAMPLES, BATCH = 4096, 128
STEPS = {"vae": 800, "logistic": 40_000}


def seconds_per_step_of_fit(
    loss_fn: Any, params: Any, data: Any, plan: Any, tx: Any, *, key: Any
) -> float:
    """From the end of the first dispatches to the end of the run."""
    seen: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        seen.append((time.perf_counter(), progress.step))

    fit(loss_fn, params, data, plan=plan, optimizer=tx, key=key, progress=note)
    (began, first), (ended, last) = seen[0], seen[-1]
    return (ended - began) / (last - first)


def measure(name: str, rounds: int) -> results.Cells:
    """Seconds per step, by kind of loop."""
    work = workload(name, NUM_EXAMPLES)
    sampler = dpoptax.samplers.Poisson(NUM_EXAMPLES, BATCH)
    plan = dpoptax.Plan(
        sampler=sampler, clip=1.0, noise_multiplier=1.0, num_steps=STEPS[name], delta=1e-5
    )
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    optimizer = optax.adam(1e-3)
    tx = optax.chain(plan.privatize(keys.noise_key), optimizer)
    step = make_train_step(work.loss_fn, tx=tx, sampler=sampler)
    state = init_state(
        work.params,
        tx=tx,
        sampler=sampler,
        sampling_key=keys.sampling_key,
        model_key=keys.model_key,
    )
    bare = jax.jit(lambda state, data: step(state, data)[0])

    def looped(state: TrainState, data: Any, count: jax.Array) -> TrainState:
        return jax.lax.fori_loop(0, count, lambda _, state: step(state, data)[0], state)

    in_loop = jax.jit(looped)
    count = jnp.asarray(STEPS[name] // 2)

    def in_python() -> None:
        current = state
        for _ in range(int(count)):
            current = bare(current, work.examples)
        jax.block_until_ready(current)

    programs = {
        "bare step in Python": in_python,
        "bare step in a loop": lambda: jax.block_until_ready(in_loop(state, work.examples, count)),
    }
    for program in programs.values():
        program()
    readings: dict[str, list[float]] = {kind: [] for kind in (*programs, "fit")}
    for _ in range(rounds):
        for kind, program in programs.items():
            began = time.perf_counter()
            program()
            readings[kind].append((time.perf_counter() - began) / int(count))
        readings["fit"].append(
            seconds_per_step_of_fit(
                work.loss_fn, work.params, work.examples, plan, optimizer, key=jax.random.key(0)
            )
        )
    return {kind: {"seconds": times} for kind, times in readings.items()}


def checkpoints(rounds: int) -> results.Cells:
    """Saves the state of the VAE under Adam."""
    work = workload("vae", 1)
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.0, expected_batch_size=BATCH, key=jax.random.key(0)),
        optax.adam(1e-3),
    )
    state = (work.params, tx.init(work.params))
    times = []
    with tempfile.TemporaryDirectory() as folder:
        kept = RunFolder(Checkpoints(folder), {})
        for step in range(rounds + 1):
            began = time.perf_counter()
            kept.save(step, state, segment=0, prng="")
            times.append(time.perf_counter() - began)
        kept.close()
    return {"save": {"seconds": times[1:]}}


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    measurements: dict[str, Callable[[], results.Cells]] = {
        name: functools.partial(measure, name, options.rounds) for name in STEPS
    }
    measurements["checkpoint of the VAE"] = functools.partial(checkpoints, options.rounds)
    with jax.numpy_dtype_promotion("standard"):
        results.study(measurements, options.out)


if __name__ == "__main__":
    main()
