"""Stage 6, the sampler and the noise that ran in, the guarantee out."""

from dpoptax.accounting import report as report
from dpoptax.accounting import trade_off as trade_off
from dpoptax.accounting.calibration import Calibrated as Calibrated
from dpoptax.accounting.calibration import calibrate_batch_size as calibrate_batch_size
from dpoptax.accounting.calibration import calibrate_noise_multiplier as calibrate_noise_multiplier
from dpoptax.accounting.calibration import calibrate_num_steps as calibrate_num_steps
from dpoptax.accounting.conversion import noise_beside_quantile as noise_beside_quantile
from dpoptax.accounting.conversion import poisson_event as poisson_event
from dpoptax.accounting.ledger import Ledger as Ledger
from dpoptax.accounting.privacy_loss import PrivacyLoss as PrivacyLoss
from dpoptax.accounting.privacy_loss import epsilon as epsilon
from dpoptax.accounting.privacy_loss import event_epsilon as event_epsilon
from dpoptax.accounting.privacy_loss import event_privacy_loss as event_privacy_loss
from dpoptax.accounting.rdp_filter import BudgetSpentError as BudgetSpentError
from dpoptax.accounting.rdp_filter import RdpFilter as RdpFilter
from dpoptax.accounting.report import Report as Report
