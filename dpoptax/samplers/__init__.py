"""Samplers: which examples take part in each step, and the privacy event of that choice."""

from dpoptax import _serialize
from dpoptax._masked_examples import MaskedExamples
from dpoptax.samplers._balls_in_bins import BallsInBins
from dpoptax.samplers._base import Batch, Sampler
from dpoptax.samplers._cyclic_poisson import CyclicPoisson
from dpoptax.samplers._draw_examples import draw_examples
from dpoptax.samplers._fixed_size import FixedSize
from dpoptax.samplers._iterate import iterate_batches
from dpoptax.samplers._min_separated import MinSeparated
from dpoptax.samplers._participation import Participation
from dpoptax.samplers._poisson import Poisson
from dpoptax.samplers._poisson_schedule import PoissonSchedule
from dpoptax.samplers._random_cyclic_poisson import RandomCyclicPoisson
from dpoptax.samplers._shuffled import Shuffled
from dpoptax.samplers._take import sharded_take, take
from dpoptax.samplers._user_examples_poisson import UserExamplesPoisson
from dpoptax.samplers._user_poisson import UserPoisson

# What JSON can hold. A new sampler joins by one line.
_serialize.register(Poisson)
_serialize.register(PoissonSchedule)
_serialize.register(CyclicPoisson)
_serialize.register(FixedSize)
_serialize.register(Shuffled)
_serialize.register(BallsInBins)
_serialize.register(MinSeparated)
_serialize.register(RandomCyclicPoisson)
# Their numbers are public; the user of every example is not, and stays out of JSON.
_OF_USERS = ("num_examples", "expected_batch_size", "max_examples_per_user", "max_batch_size")
_serialize.register(UserPoisson, names=_OF_USERS, make=UserPoisson._from_record)
_serialize.register(UserExamplesPoisson, names=_OF_USERS, make=UserExamplesPoisson._from_record)
_serialize.register_interface(
    Sampler, describe_by=("unit", "num_examples", "expected_batch_size", "max_batch_size")
)

# In the order of the pipeline: samplers, what they return, what to do with it.
__all__ = [
    "Poisson",
    "PoissonSchedule",
    "CyclicPoisson",
    "RandomCyclicPoisson",
    "UserPoisson",
    "UserExamplesPoisson",
    "BallsInBins",
    "MinSeparated",
    "FixedSize",
    "Shuffled",
    "Sampler",
    "Batch",
    "Participation",
    "MaskedExamples",
    "take",
    "sharded_take",
    "draw_examples",
    "iterate_batches",
]
