"""A plan, a model and data in; private parameters out."""

from dpoptax.training.checkpoints import Checkpoints as Checkpoints
from dpoptax.training.loop import fit as fit
from dpoptax.training.memory import choose_microbatch_size as choose_microbatch_size
from dpoptax.training.objective import Objective as Objective
from dpoptax.training.progress import Progress as Progress
from dpoptax.training.result import FitResult as FitResult
from dpoptax.training.step import StepInfo as StepInfo
from dpoptax.training.step import TrainState as TrainState
from dpoptax.training.step import init_state as init_state
from dpoptax.training.step import make_train_step as make_train_step
from dpoptax.training.streaming import Streamed as Streamed
