"""MNIST without public data."""

import math

from leaderboard import data
from leaderboard.task import Published, Task, accuracy

TRAMER_BONEH = "Tramèr and Boneh 2021, arXiv:2011.11660, and the README of their code"

TASK = Task(
    name="mnist",
    title="MNIST",
    about="60,000 training and 10,000 test images, ten classes. No recipe uses public data.",
    load=data.mnist,
    score=accuracy,
    delta=1e-5,
    epsilons=(1.0, 1.2, 2.93, 3.0, 8.0, math.inf),
    published=(
        Published("linear model on scattering features", 3.0, 98.7, TRAMER_BONEH),
        Published("CNN on scattering features", 3.0, 98.7, TRAMER_BONEH),
        Published("CNN, end to end", 3.0, 98.1, TRAMER_BONEH),
        Published(
            "CNN with tempered sigmoids, end to end",
            2.93,
            98.1,
            "Papernot et al. 2021, arXiv:2007.14191",
        ),
    ),
)
