"""UCI Adult: whether a person earns more than 50,000 dollars a year."""

import math

import numpy as np
from sklearn.metrics import roc_auc_score

from leaderboard import data
from leaderboard.task import Metric, Published, Task, accuracy


def score(predict, inputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the area under the ROC curve, and the accuracy in percent."""
    return {
        "AUROC": float(roc_auc_score(labels, np.asarray(predict(inputs)))),
        **accuracy(predict, inputs, labels),
    }


README = "README of InterpretML, table of AUROC, github.com/interpretml/interpret"

TASK = Task(
    name="adult",
    title="Adult",
    about="30,162 training and 15,060 test rows of UCI Adult, those without missing values, in the "
    "published split. The label says whether a person earns more than 50,000 dollars a year.",
    load=data.adult,
    score=score,
    metrics=(Metric("AUROC", "", digits=4), Metric("accuracy")),
    delta=1e-5,
    epsilons=(0.5, 1.0, 3.0, 8.0, math.inf),
    published=(
        Published("logistic regression", math.inf, 0.907, README, "AUROC", "another split"),
        Published("explainable boosting", math.inf, 0.928, README, "AUROC", "another split"),
    ),
)
