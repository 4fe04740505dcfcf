"""Stage 1, a key in, the indices and the mask of each batch out."""

from dpoptax.samplers import feistel
from dpoptax.samplers._balls_in_bins import BallsInBins
from dpoptax.samplers._base import Batch, Sampler, SamplerState
from dpoptax.samplers._cyclic_poisson import CyclicPoisson
from dpoptax.samplers._fixed_size import FixedSize
from dpoptax.samplers._iterate import iterate_batches
from dpoptax.samplers._poisson import Poisson
from dpoptax.samplers._poisson_schedule import PoissonSchedule
from dpoptax.samplers._shuffled import Shuffled
from dpoptax.samplers._take import sharded_take, take
from dpoptax.samplers._user_poisson import UserPoisson

__all__ = [
    "BallsInBins",
    "Batch",
    "CyclicPoisson",
    "FixedSize",
    "Poisson",
    "PoissonSchedule",
    "Sampler",
    "SamplerState",
    "Shuffled",
    "UserPoisson",
    "feistel",
    "sharded_take",
    "iterate_batches",
    "take",
]
