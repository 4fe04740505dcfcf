"""One of two releases, by a coin that may be known: what a step costs whose batch may be full.

The coin is the same on both of two neighbouring data sets, and what else is released may betray
it, as a sum that is short of all who were drawn betrays that its batch was full. So no doubt
about it may be counted on, as a mixture of Gaussians would: by joint convexity

    D(P || Q) <= (1 - probability) D(P_usual || Q_usual) + probability D(P_rare || Q_rare)

for every hockey-stick divergence D, and that is what is accounted.
"""

import attr
from dp_accounting import DpEvent


@attr.s(frozen=True, slots=True, auto_attribs=True)
class KnownMixtureDpEvent(DpEvent):  # type: ignore[misc]
    """A release, or with some probability another.

    Attributes:
        usual: what is released else.
        rare: what is released with that probability.
        probability: of `rare`, on both of two neighbouring data sets.
    """

    usual: DpEvent
    rare: DpEvent
    probability: float
