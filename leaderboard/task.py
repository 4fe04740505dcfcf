"""What a task of the leaderboard is: data, metrics and published results."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import attrs
import numpy as np


class Metric(NamedTuple):
    """How a model is judged.

    Attributes:
        name: for example "accuracy", unique within its task.
        unit: "%", "nats", or "" for a number without unit.
        higher_is_better: False for a loss.
        digits: how many decimals the page shows.
    """

    name: str
    unit: str = "%"
    higher_is_better: bool = True
    digits: int = 2


class Published(NamedTuple):
    """A result of others.

    Attributes:
        name: what the page calls the method.
        epsilon: at the delta of the task, unless `note` says otherwise; `math.inf` without privacy.
        value: of the metric.
        source: the reference, with the table or the figure.
        metric: the name of the metric.
        note: what differs from the task, such as another split, or public data.
    """

    name: str
    epsilon: float
    value: float
    source: str
    metric: str = "accuracy"
    note: str = ""


@attrs.frozen(kw_only=True)
class Task:
    """Data with a fixed split, metrics, and published results.

    Attributes:
        name: the name of the module, which the command line and the recipes use.
        title: for the page.
        about: one or two sentences for the page: the sizes of the data, what is predicted.
        load: returns the data, an `example_data.Data`. Raises SystemExit with the remedy if the
            data are missing.
        score: `score(predict, inputs, labels)` returns one number for each metric. `predict` is
            what the recipe returns.
        metrics: the first one decides the order of the rows.
        delta: of all runs.
        epsilons: of all runs; `math.inf` is the same recipe without noise.
        published: results of others.
    """

    name: str
    title: str
    about: str
    load: Callable[[], Any]
    score: Callable[[Any, np.ndarray, np.ndarray], Mapping[str, float]]
    metrics: tuple[Metric, ...] = (Metric("accuracy"),)
    delta: float
    epsilons: tuple[float, ...] = (1.0, 3.0, 8.0, math.inf)
    published: tuple[Published, ...] = ()


def accuracy(
    predict: Callable[[np.ndarray], Any], inputs: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Returns the accuracy in percent.

    Args:
        predict: returns logits, `(batch, classes)`, or the logit of label 1, `(batch,)`.
        inputs: `(num_test, ...)`.
        labels: `(num_test,)`.
    """
    # The batches bound the memory of a large network.
    parts = [np.asarray(predict(inputs[at : at + 2000])) for at in range(0, len(inputs), 2000)]
    logits = np.concatenate(parts)
    guesses = logits.argmax(axis=1) if logits.ndim == 2 else logits > 0
    return {"accuracy": 100 * float(np.mean(guesses == labels))}
