"""Times one clip-and-sum of each workload: plain, factored, micro-batched and stacked, in one run.

    python -m benchmarks.step_time --rounds 9 --out results.json [workload ...]

Every round times all forms one after the other; what is printed are medians over rounds, and the
median of the ratios to the plain gradient (`jit` of `grad` of the mean loss) of the same round.
Temporary memory and compile time are those that XLA reports.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import dpoptax
from benchmarks.models import PARAMETER_COUNTS, Workload, workload

# Shorter programs are run several times per reading.
READING_SECONDS = 0.02


def forms(work: Workload, microbatch_size: int) -> dict[str, Callable[..., Any]]:
    """The plain gradient, and clip-and-sum in every form, as functions of (params, examples)."""
    rule = dpoptax.clipping.flat(1.0)

    def plain(params: Any, examples: Any) -> Any:
        batch = jax.tree.leaves(examples)[0].shape[0]
        inputs = (examples,) if work.key is None else (examples, jax.random.split(work.key, batch))

        def mean_loss(params: Any) -> jax.Array:
            return jax.vmap(lambda *row: work.loss_fn(params, *row))(*inputs).mean()

        return jax.grad(mean_loss)(params)

    def private(**options: Any) -> Callable[..., Any]:
        grads_fn = dpoptax.per_example_grads(work.loss_fn, **options)

        def clip_and_sum(params: Any, examples: Any) -> Any:
            return grads_fn(params, examples, key=work.key).clip_and_sum(rule.weights)

        return clip_and_sum

    return {
        "plain": plain,
        "factored": private(),
        "microbatched": private(microbatch_size=microbatch_size),
        "stacked": private(factored=False),
    }


def measure(name: str, batch: int, rounds: int, chosen: list[str], microbatch: int) -> dict:
    """Returns milliseconds, ratios, MiB of temporary memory and compile seconds, by form."""
    work = workload(name, batch)
    arguments = (work.params, work.examples)
    compiled, compile_seconds, repeats = {}, {}, {}
    for form, function in forms(work, microbatch).items():
        if form in chosen:
            lowered = jax.jit(function).lower(*arguments)
            start = time.perf_counter()
            compiled[form] = lowered.compile()
            compile_seconds[form] = time.perf_counter() - start
            repeats[form] = 1
            jax.block_until_ready(compiled[form](*arguments))
            once = read(compiled[form], arguments, 1)
            repeats[form] = max(1, int(READING_SECONDS / once))
    readings = {form: [] for form in compiled}
    for _ in range(rounds):
        for form, function in compiled.items():
            readings[form].append(read(function, arguments, repeats[form]))
    return {
        form: {
            "milliseconds": 1e3 * statistics.median(times),
            "ratio": statistics.median(
                t / p for t, p in zip(times, readings["plain"], strict=True)
            ),
            "temp_mib": compiled[form].memory_analysis().temp_size_in_bytes / 2**20,
            "compile_seconds": compile_seconds[form],
        }
        for form, times in readings.items()
    }


def read(function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    """Returns the seconds of one run, averaged over `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "workloads", nargs="*", help=f"of {', '.join(PARAMETER_COUNTS)}; default all"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--microbatch", type=int, default=8, help="examples per micro-batch")
    parser.add_argument("--forms", nargs="+", default=["plain", "factored", "stacked"],
                        choices=["plain", "factored", "microbatched", "stacked"])  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(PARAMETER_COUNTS):
        parser.error(
            f"no workload {', '.join(sorted(unknown))}; there are {', '.join(PARAMETER_COUNTS)}"
        )
    chosen = ["plain", *(form for form in options.forms if form != "plain")]
    device = jax.devices()[0].device_kind
    print(f"batch {options.batch}, {device}, {platform.machine()}, JAX {jax.__version__}")
    print(f"{'workload':12}  {'form':12} {'ms':>9} {'ratio':>6} {'MiB':>7} {'compile s':>10}")
    results = {}
    for name in options.workloads or PARAMETER_COUNTS:
        results[name] = measure(name, options.batch, options.rounds, chosen, options.microbatch)
        for form, row in results[name].items():
            print(
                f"{name:12}  {form:12} {row['milliseconds']:9.3f} {row['ratio']:6.2f} "
                f"{row['temp_mib']:7.0f} {row['compile_seconds']:10.1f}",
                flush=True,
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"device": device, "results": results}, indent=2))


if __name__ == "__main__":
    main()
