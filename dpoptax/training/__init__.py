"""A plan, a model and data in; private parameters out."""

from dpoptax.training._fit import fit
from dpoptax.training._host_data import HostData
from dpoptax.training._memory import choose_microbatch_size
from dpoptax.training._objective import Objective
from dpoptax.training._progress import Progress
from dpoptax.training._result import FitResult
from dpoptax.training._resume.checkpoints import Checkpoints
from dpoptax.training._train_step import StepInfo, TrainState, init_state, make_train_step

__all__ = [
    "Checkpoints",
    "FitResult",
    "HostData",
    "Objective",
    "Progress",
    "StepInfo",
    "TrainState",
    "choose_microbatch_size",
    "fit",
    "init_state",
    "make_train_step",
]
