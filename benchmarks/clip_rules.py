"""Costs of clip rules: a private step with each rule, beside that with one flat bound.

    python -m benchmarks.clip_rules [--batch 128] [--rounds 15] [model ...]

A step is the gradients of the batch, their clipped sum, noise and SGD. It prints medians of ratios
over rounds, in which all programs run one after the other.
"""

import argparse
from typing import Any

import jax
import optax

import dpoptax
from benchmarks import results
from benchmarks.models import Workload, workload
from benchmarks.timing import compiled, interleaved
from dpoptax import clipping

MODELS = ("fcnn", "vae", "mnist", "transformer")


def rules(params: Any) -> dict[str, Any]:
    """All clip rules for these parameters, by the name that is printed. The flat one is first."""
    return {
        "flat": clipping.FlatClip(1.0),
        "group": clipping.GroupClip({name: len(params) ** -0.5 for name in params}),
        "per layer": clipping.PerLayerClip(1.0),
        "per layer, by size": clipping.PerLayerClip.by_size(1.0, params),
        "AUTO-S": clipping.AutoSClip(1.0),
        "PSAC": clipping.PsacClip(1.0),
        "normalized": clipping.NormalizedClip(1.0),
        "quantile": clipping.QuantileClip(1.0),
    }


def step_of(work: Workload, rule: Any, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """Returns a step, and its arguments."""
    private = dpoptax.privatize(
        rule, noise_multiplier=1.1, expected_batch_size=batch, key=jax.random.key(0)
    )
    tx = dpoptax.transforms.chain(private, optax.sgd(0.1))
    grads_fn = dpoptax.per_example_grads(work.loss_fn)

    def step(params: Any, state: Any, examples: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads_fn(params, examples, key=work.key), state, params)
        return optax.apply_updates(params, updates), state

    return step, (work.params, tx.init(work.params), work.examples)


def measure(name: str, batch: int, rounds: int) -> None:
    """Prints a line for each rule."""
    work = workload(name, batch)
    programs = {
        rule: compiled(*step_of(work, value, batch))[0]
        for rule, value in rules(work.params).items()
    }
    cells = {rule: {"seconds": seconds} for rule, seconds in interleaved(programs, rounds).items()}
    for rule, cell in cells.items():
        ratio = results.ratio(cells, rule, "flat")
        print(f"{name}, {rule}: {results.median(cell) * 1e3:.3f} ms, {ratio:.2f}x")


def main() -> None:
    """Measures the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for name in options.models:
        measure(name, options.batch, options.rounds)


if __name__ == "__main__":
    main()
