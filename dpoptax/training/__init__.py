"""The private training loop: `fit`, and the step that it repeats."""

from dpoptax.training._data import DeviceData, HostData
from dpoptax.training._fit import fit
from dpoptax.training._memory import choose_microbatch_size
from dpoptax.training._objective import Objective
from dpoptax.training._progress import Every, Progress
from dpoptax.training._result import FitResult
from dpoptax.training._resume.settings import Checkpoints
from dpoptax.training._stopping import time_limit
from dpoptax.training._train_step import StepInfo, TrainState, init_state, make_train_step

__all__ = [
    "fit",
    "FitResult",
    "DeviceData",
    "HostData",
    "Checkpoints",
    "time_limit",
    "Progress",
    "Every",
    "Objective",
    "TrainState",
    "StepInfo",
    "init_state",
    "make_train_step",
    "choose_microbatch_size",
]
