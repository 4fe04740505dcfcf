"""What a recipe of the leaderboard is: a function that trains a model with dpoptax."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import attrs

import dpoptax
from dpoptax.training import FitResult

# How the settings of a recipe were found. The epsilon of a run does not cover this choice.
Tuning = Literal[
    "not at all",
    "on other data",
    "from published settings",
    "on training examples held out",
    "by hand on the test data",
]


class StoppedEarlyError(RuntimeError):
    """A signal or a time limit ended the training, so its score is not that of the recipe."""


def finished(result: FitResult) -> FitResult:
    """Returns the result of `fit` if it made all steps of its plan.

    Raises:
        StoppedEarlyError: it did not.
    """
    if result.stopped != "plan":
        raise StoppedEarlyError(
            f"training stopped after {result.num_steps} of {result.plan.num_steps} steps, because "
            f'of "{result.stopped}"; run the recipe again.'
        )
    return result


class Trained(NamedTuple):
    """What a recipe returns.

    Attributes:
        predict: takes a batch of test inputs; `Task.score` says what it returns.
        params: the released parameters.
        epsilon: of everything that the recipe released, as its report states it.
        result: what `fit` returned. If the recipe calls `fit` twice, pass the first result through
            `finished`, and the last one here. A run that stopped early leaves no record.
    """

    predict: Callable[..., Any]
    params: Any
    epsilon: float
    result: FitResult


@attrs.frozen(kw_only=True)
class Recipe:
    """One row of the leaderboard.

    Attributes:
        name: the name of the module, which the command line uses.
        task: the name of the task's module.
        title: for the page, such as "linear model on scattering features".
        tuned: how the settings were found.
        train: `train(data, epsilon, delta, seed)` trains on `data.train_inputs` and
            `data.train_labels` only, and returns `Trained`. `epsilon` is `math.inf` for the run
            without noise.
        epsilons: instead of the epsilons of the task.
        seconds: the time of one run on two cores, about.
        notes: sentences for the page: what was tried, how many runs the tuning took.
    """

    name: str
    task: str
    title: str
    tuned: Tuning
    train: Callable[[Any, float, float, int], Trained]
    epsilons: tuple[float, ...] | None = None
    seconds: float = 60.0
    notes: str = ""


def plan_for(
    *,
    num_examples: int,
    expected_batch_size: float,
    num_steps: int,
    epsilon: float,
    delta: float,
    clip: Any,
) -> dpoptax.Plan:
    """Returns `Plan.calibrate(...)`; with an infinite epsilon, the same plan without noise.

    Gradients are clipped in both, so that one learning rate fits both.
    """
    sampler = dpoptax.samplers.Poisson(num_examples, expected_batch_size)
    if math.isfinite(epsilon):
        return dpoptax.Plan.calibrate(
            sampler=sampler, num_steps=num_steps, epsilon=epsilon, delta=delta, clip=clip
        )
    return dpoptax.Plan(
        sampler=sampler, num_steps=num_steps, noise_multiplier=0.0, delta=delta, clip=clip
    )
