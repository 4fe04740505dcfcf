"""UCI Adult with one network and one plan, to compare private optimizers."""

import attrs

from leaderboard.tasks import adult

TASK = attrs.evolve(
    adult.TASK,
    name="adult_optimizers",
    title="Private optimizers on Adult",
    about="The rows of Adult, a network with 32 hidden units, 400 Poisson batches of 2,048 and "
    "clip bound 1. Only the optimizer differs between the rows. Learning rates are the best of "
    "five to seven at ε = 1, on training examples held out, and serve every ε. For DP-AdamBC, "
    "scale-then-privatize and DiSK we also compared two values of `floor`, `eps` and `gain`.",
    published=(),
)
