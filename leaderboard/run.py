"""Runs recipes, and keeps a record of each finished run."""

import math
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from leaderboard import data as data_sets
from leaderboard import records, registry
from leaderboard.recipe import Recipe, finished
from leaderboard.records import Record
from leaderboard.task import Task


class Run(NamedTuple):
    """One recipe at one epsilon with one seed."""

    recipe: Recipe
    task: Task
    epsilon: float
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe.name}, epsilon {records.run_name(self.epsilon)}, seed {self.seed}"


def planned(
    recipes: Iterable[Recipe], epsilons: tuple[float, ...] | None, seeds: int
) -> Iterator[Run]:
    """All runs of these recipes; `epsilons` selects among those of each recipe."""
    tasks = registry.all_tasks()
    for recipe in recipes:
        task = tasks[recipe.task]
        for epsilon in recipe.epsilons or task.epsilons:
            if epsilons is None or epsilon in epsilons:
                yield from (Run(recipe, task, epsilon, seed) for seed in range(seeds))


def train(run: Run, *, validate: bool) -> Record:
    """Trains and scores one model.

    Args:
        run: what to train.
        validate: trains on five sixths of the training examples and scores on the others, which is
            how settings are chosen.

    Raises:
        SystemExit: the data are missing.
        StoppedEarlyError: the recipe did not make all of its steps.
        ValueError: the recipe spent more than its epsilon.
    """
    data = run.task.load()
    if validate:
        data = data_sets.held_out(data)
    began = time.perf_counter()
    trained = run.recipe.train(data, run.epsilon, run.task.delta, run.seed)
    finished(trained.result)
    jax.block_until_ready(trained.params)
    seconds = time.perf_counter() - began
    if trained.epsilon > run.epsilon * (1 + 1e-9):
        raise ValueError(f"{run} spent epsilon {trained.epsilon:g}; give it a smaller budget.")
    scores = run.task.score(trained.predict, data.test_inputs, data.test_labels)
    return {
        "run": records.run_name(run.epsilon),
        "seed": run.seed,
        "epsilon": trained.epsilon if math.isfinite(trained.epsilon) else None,
        "delta": run.task.delta,
        "scores": {name: round(float(value), 5) for name, value in scores.items()},
        "num_parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(trained.params)),
        "seconds": round(seconds, 1),
        "digest": registry.digest(run.recipe.name),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def run_all(runs: Iterable[Run], folder: pathlib.Path, *, validate: bool, again: bool) -> None:
    """Runs what has no record yet, and writes each record at once."""
    left_out: dict[str, Any] = {}
    for run in runs:
        if run.recipe.task in left_out or (not again and is_done(run, folder)):
            continue
        print(f"{run} ...", end=" ", flush=True)
        try:
            record = train(run, validate=validate)
        except SystemExit as missing:
            left_out[run.recipe.task] = missing
            print(f"left out: {missing}")
            continue
        records.append(folder, run.recipe.name, record)
        scores = ", ".join(f"{name} {value:g}" for name, value in record["scores"].items())
        print(f"{scores} in {record['seconds']:.0f} s", flush=True)


def is_done(run: Run, folder: pathlib.Path) -> bool:
    """Whether there is a record."""
    return record_of(run, folder) is not None


def record_of(run: Run, folder: pathlib.Path) -> Record | None:
    """Returns the record of a run, if there is one."""
    for record in records.load(folder, run.recipe.name):
        if (record["run"], record["seed"]) == (records.run_name(run.epsilon), run.seed):
            return record
    return None
