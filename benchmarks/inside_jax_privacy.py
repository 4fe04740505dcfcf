"""JAX Privacy's `clipped_grad` and ours in its place: time, memory and FLOP of one call.

    pip install jax-privacy==2.0.0
    python -m benchmarks.inside_jax_privacy --batch 64

Ratios are ours / theirs: medians of the ratios of interleaved rounds, with the quartiles.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.models import Workload, workload
from benchmarks.peers.jax_steps import inputs_of
from benchmarks.peers.step import CLIP
from benchmarks.timing import compiled, interleaved

MODELS = ("fcnn", "mnist", "transformer")


def call(clipped_grad: Callable[..., Any], work: Workload, microbatch_size: int | None) -> Any:
    """Returns a function of parameters and examples."""
    count = len(inputs_of(work, work.examples))
    grad_fn = clipped_grad(
        work.loss_fn,
        l2_clip_norm=CLIP,
        batch_argnums=tuple(range(1, 1 + count)),
        keep_batch_dim=False,
        microbatch_size=microbatch_size,
    )
    return lambda params, examples: grad_fn(params, *inputs_of(work, examples))


def main() -> None:
    """Prints one line per model."""
    import jax_privacy

    from dpoptax.compat.jax_privacy import clipped_grad

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--microbatch-size", type=int, default=None)
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    for name in options.models:
        work, programs, memory = workload(name, options.batch), {}, {}
        for who, function in (("ours", clipped_grad), ("theirs", jax_privacy.clipped_grad)):
            step = call(function, work, options.microbatch_size)
            programs[who], found = compiled(step, (work.params, work.examples))
            memory[who] = found["mib"]
        readings = interleaved(programs, options.rounds)
        ratios = [a / b for a, b in zip(readings["ours"], readings["theirs"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        seconds = {who: 1e3 * statistics.median(times) for who, times in readings.items()}
        print(
            f"{name}, batch {options.batch}: time {middle:.3f} ({low:.3f} to {high:.3f}), "
            f"{seconds['ours']:.2f} / {seconds['theirs']:.2f} ms; temporary memory "
            f"{memory['ours'] / memory['theirs']:.3f}, {memory['ours']:.1f} / "
            f"{memory['theirs']:.1f} MiB",
            flush=True,
        )
    print(jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
