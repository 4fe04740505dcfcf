"""Stage 6, the sampler and the noise that ran in, the guarantee out."""

from dpoptax.accounting import trade_off
from dpoptax.accounting._calibrate import (
    Calibrated,
    calibrate_batch_size,
    calibrate_noise_multiplier,
    calibrate_num_steps,
)
from dpoptax.accounting._epsilon import PrivacyLoss, epsilon, event_epsilon, event_privacy_loss
from dpoptax.accounting._events import noise_beside_quantile, poisson_event
from dpoptax.accounting._ledger import Ledger
from dpoptax.accounting._rdp_filter import BudgetSpentError, RdpFilter

__all__ = [
    "BudgetSpentError",
    "Calibrated",
    "Ledger",
    "PrivacyLoss",
    "RdpFilter",
    "calibrate_batch_size",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "epsilon",
    "event_epsilon",
    "event_privacy_loss",
    "noise_beside_quantile",
    "poisson_event",
    "trade_off",
]
