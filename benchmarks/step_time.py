"""Times one clip-and-sum of each model: plain, factored, microbatched and stacked, in one run.

    python -m benchmarks.step_time --rounds 9 --out results.json [model ...]

Each round times all forms one after the other. Printed numbers are medians over rounds, and the
median of the ratios to the plain gradient (`jit` of `grad` of the mean loss) of the same round.
Temporary memory and compile time are those that XLA reports.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import dpoptax
from benchmarks import results
from benchmarks.models import PARAMETER_COUNTS, Workload, workload
from benchmarks.peers.jax_steps import mean_gradient
from benchmarks.timing import Program, compiled, interleaved

Cells = results.Cells
FORMS = ("plain", "factored", "stacked")


def forms(work: Workload, microbatch_size: int) -> dict[str, Callable[..., Any]]:
    """The plain gradient, and clip-and-sum in every form, as functions of (params, examples)."""
    rule = dpoptax.clipping.FlatClip(1.0)

    def private(**options: Any) -> Callable[..., Any]:
        grads_fn = dpoptax.per_example_grads(work.loss_fn, **options)

        def clip_and_sum(params: Any, examples: Any) -> Any:
            return grads_fn(params, examples, key=work.key).clip_and_sum(rule.weights)

        return clip_and_sum

    return {
        "plain": functools.partial(mean_gradient, work),
        "factored": private(),
        "microbatched": private(microbatch_size=microbatch_size),
        "stacked": private(form="stacked"),
    }


def measure(
    work: Workload, rounds: int, chosen: Sequence[str] = FORMS, microbatch: int = 8
) -> Cells:
    """Returns, by form, readings, MiB of temporary memory and seconds of compiling."""
    arguments = (work.params, work.examples)
    cells: Cells = {}
    programs: dict[str, Program] = {}
    for form, function in forms(work, microbatch).items():
        if form in chosen:
            programs[form], cells[form] = compiled(function, arguments)
    for form, seconds in interleaved(programs, rounds).items():
        cells[form]["seconds"] = seconds
    return cells


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "workloads", nargs="*", help=f"of {', '.join(PARAMETER_COUNTS)}; default all"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--microbatch", type=int, default=8, help="examples per micro-batch")
    parser.add_argument("--forms", nargs="+", default=FORMS,
                        choices=["plain", "factored", "microbatched", "stacked"])  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(PARAMETER_COUNTS):
        parser.error(
            f"no workload {', '.join(sorted(unknown))}; there are {', '.join(PARAMETER_COUNTS)}"
        )
    chosen = ["plain", *(form for form in options.forms if form != "plain")]

    def cells_of(name: str) -> Cells:
        return measure(workload(name, options.batch), options.rounds, chosen, options.microbatch)

    names = options.workloads or PARAMETER_COUNTS
    results.study(
        {f"{name}, {options.batch}": functools.partial(cells_of, name) for name in names},
        options.out,
    )


if __name__ == "__main__":
    main()
