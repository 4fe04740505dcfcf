"""Privacy report of released tables, as `dpoptax.Report`."""

from typing import Any

import attrs

from dpoptax.mechanisms import DiscreteGaussian
from dpoptax.random._keys import describe_key
from dpoptax.reports import Report
from dpoptax.synthetic._releases import BITS, Releases

RELEASED = (
    "noisy counts of each column, noisy scores of pairs of columns, and noisy two-way tables; and "
    "so the synthetic data, the noisy number of rows, and the utility report"
)
ASSUMPTIONS = (
    "The schema is public: its columns, ranges and categories were not read from the data.",
    "Each row belongs to one person. Someone with several rows is protected as a group of that "
    "size.",
    "The number of rows is private. The numbers of rows here and of the synthetic data are noisy.",
)


def report_of(releases: Releases, total: float, key: Any) -> Report:
    """Returns the report of everything that was released."""
    ledger = releases.ledger
    mechanism = DiscreteGaussian(bits=BITS)
    report = Report.from_ledger(
        ledger,
        steps_done=ledger.num_steps,
        steps_planned=ledger.num_steps,
        noise_multiplier=ledger.noise_multiplier,
        mechanism=mechanism,
        prng=describe_key(key),
    )
    # The ledger does not know the number of rows, which is private; here is the noisy one.
    return attrs.evolve(
        report,
        unit="row",
        num_units=max(round(total), 1),
        noisy_num_units=True,
        released=RELEASED,
        sampler={"kind": "EveryRowInEveryRelease"},
        clip={"kind": "OneCellOfEachTable"},
        assumptions=(*report.assumptions, *ASSUMPTIONS),
    )
