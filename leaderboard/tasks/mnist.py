"""MNIST without public data."""

import math

from leaderboard import data
from leaderboard.task import Task, accuracy

TASK = Task(
    name="mnist",
    title="MNIST",
    about="60,000 training and 10,000 test images, ten classes. No recipe uses public data.",
    load=data.mnist,
    score=accuracy,
    delta=1e-5,
    epsilons=(1.0, 1.2, 2.93, 3.0, 8.0, math.inf),
)
