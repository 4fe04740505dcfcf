"""scikit-learn's handwritten digits."""

from leaderboard import data
from leaderboard.task import Task, accuracy

TASK = Task(
    name="digits",
    title="Digits",
    about="1,437 training and 360 test images of 8 x 8 pixels, ten classes, from scikit-learn.",
    load=data.digits,
    score=accuracy,
    delta=1e-4,
)
