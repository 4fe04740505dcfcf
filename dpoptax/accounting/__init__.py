"""Privacy accounting: the (epsilon, delta) of a run, calibration to a budget, and ledgers."""

from dpoptax.accounting import trade_off
from dpoptax.accounting._attack_risk import (
    Advantage,
    PosteriorBelief,
    Reconstruction,
    TruePositiveRate,
)
from dpoptax.accounting._calibrate import calibrate_noise_multiplier
from dpoptax.accounting._calibrate_length import calibrate_batch_size, calibrate_num_steps
from dpoptax.accounting._epsilon import epsilon, event_epsilon
from dpoptax.accounting._events import poisson_event
from dpoptax.accounting._ledger import Ledger
from dpoptax.accounting._random_runs import RandomRuns
from dpoptax.accounting._rdp_filter import BudgetSpentError, RdpFilter
from dpoptax.accounting._tuned import tuned

__all__ = [
    # What a run costs
    "epsilon",
    "event_epsilon",
    # What a search over several runs costs
    "tuned",
    "RandomRuns",
    # Which settings keep a budget
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "calibrate_batch_size",
    # What an attack may reach, in place of a budget
    "Advantage",
    "TruePositiveRate",
    "PosteriorBelief",
    "Reconstruction",
    # Counting releases as they happen
    "Ledger",
    "RdpFilter",
    "BudgetSpentError",
    # Events, and what an attacker can find out
    "poisson_event",
    "trade_off",
]
