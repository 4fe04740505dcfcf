"""scikit-learn's breast cancer data."""

from leaderboard import data
from leaderboard.task import Task, accuracy

TASK = Task(
    name="breast_cancer",
    title="Breast cancer",
    about="455 training and 114 test patients with 30 measurements each, benign or malignant, from "
    "scikit-learn. One test patient is 0.9 percent.",
    load=data.breast_cancer,
    score=accuracy,
    delta=1e-4,
)
