"""Stage 6, the sampler and the noise that ran in, the guarantee out."""

from dpoptax.accounting.calibration import (
    calibrate_noise_multiplier as calibrate_noise_multiplier,
)
from dpoptax.accounting.privacy_loss import epsilon as epsilon
from dpoptax.accounting.privacy_loss import event_epsilon as event_epsilon
