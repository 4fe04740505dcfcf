"""Times epsilon, calibration, schedules and reports.

    python -m benchmarks.accounting --rounds 5 --out results.json

Each round changes the noise a little, so that no result is cached. Printed numbers are medians over
rounds. The accountant and the search of dp-accounting are measured too.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable

import dp_accounting
from dp_accounting.pld import PLDAccountant

import dpoptax
from benchmarks import results
from dpoptax import accounting
from dpoptax.schedules import Schedule

SAMPLER = dpoptax.samplers.Poisson(60_000, 128)
RUN = {"sampler": SAMPLER, "delta": 1e-5}


def theirs(noise: float) -> float:
    """Epsilon by dp-accounting alone."""
    accountant = PLDAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(SAMPLER.sampling_rate, gaussian), 9380)
    return accountant.get_epsilon(1e-5)


def their_search(target: float) -> float:
    """Calibration by dp-accounting alone."""

    def event(noise: float) -> dp_accounting.DpEvent:
        return dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(
                SAMPLER.sampling_rate, dp_accounting.GaussianDpEvent(noise)
            ),
            9380,
        )

    return dp_accounting.calibrate_dp_mechanism(
        PLDAccountant, event, target, 1e-5, dp_accounting.LowerEndpointAndGuess(0.3, 1.0), tol=1e-3
    )


def of_plan(noise: float, relation: str = "add_or_remove_one", sampler=SAMPLER) -> float:
    return accounting.epsilon(
        sampler=sampler, delta=1e-5, noise_multiplier=noise, num_steps=9380, relation=relation
    )


def schedule(shift: float) -> float:
    values = tuple(1.0 + 0.02 * place + shift for place in range(50))
    noise = Schedule(values, (188,) * 50)
    return accounting.epsilon(noise_multiplier=noise, num_steps=9380, **RUN)


def report(noise: float) -> str:
    plan = dpoptax.Plan(clip=1.0, noise_multiplier=noise, num_steps=9380, **RUN)
    return str(dpoptax.Report.from_plan(plan))


def programs() -> dict[str, Callable[[float], object]]:
    """What is timed, as functions of a small number that makes every call another question."""
    noise, steps, size = (
        accounting.calibrate_noise_multiplier,
        accounting.calibrate_num_steps,
        accounting.calibrate_batch_size,
    )
    full = dpoptax.samplers.FixedSize(60_000, 128)
    found: dict[str, Callable[[float], object]] = {
        "epsilon, noise 1.1": lambda x: of_plan(1.1 + x),
        "epsilon, noise 0.3": lambda x: of_plan(0.3 + x),
        "epsilon, replace one": lambda x: of_plan(1.1 + x, "replace_one"),
        "epsilon, full batches": lambda x: of_plan(1.1 + x, sampler=full),
        "epsilon, 50 noises": schedule,
        "report": lambda x: report(1.1 + x),
        "steps for epsilon 1": lambda x: steps(epsilon=1.0, noise_multiplier=1.1 + x, **RUN),
        "batch for epsilon 1": lambda x: size(
            epsilon=1.0, delta=1e-5, num_examples=60_000, noise_multiplier=1.1 + x, num_steps=9380
        ),
        "dp-accounting, epsilon, noise 1.1": lambda x: theirs(1.1 + x),
        "dp-accounting, noise for epsilon 1": lambda x: their_search(1.0 + x),
    }
    for target in (0.1, 1.0, 8.0, 50.0):
        call = functools.partial(noise, num_steps=9380, **RUN)
        found[f"noise for epsilon {target:g}"] = lambda x, c=call, t=target: c(epsilon=t + x)
    return found


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()

    def cells() -> results.Cells:
        readings: dict[str, list[float]] = {name: [] for name in programs()}
        for number in range(options.rounds):
            for name, program in programs().items():
                began = time.perf_counter()
                program(1e-4 * (number + 1))
                readings[name].append(time.perf_counter() - began)
        return {name: {"seconds": seconds} for name, seconds in readings.items()}

    results.study({"9,380 steps": cells}, options.out)


if __name__ == "__main__":
    main()
