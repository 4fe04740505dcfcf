"""Stage 1, a key in, the indices and the mask of each batch out."""

from dpoptax.samplers.gather import take as take
from dpoptax.samplers.poisson import Poisson as Poisson
from dpoptax.samplers.protocol import Batch as Batch
from dpoptax.samplers.protocol import Sampler as Sampler
