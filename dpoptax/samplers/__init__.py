"""Stage 1, a key in, the indices and the mask of each batch out."""

from dpoptax.samplers import feistel as feistel
from dpoptax.samplers.balls_in_bins import BallsInBins as BallsInBins
from dpoptax.samplers.cyclic import CyclicPoisson as CyclicPoisson
from dpoptax.samplers.fixed_size import FixedSize as FixedSize
from dpoptax.samplers.gather import take as take
from dpoptax.samplers.gather import take_over as take_over
from dpoptax.samplers.host import stream as stream
from dpoptax.samplers.poisson import Poisson as Poisson
from dpoptax.samplers.protocol import Batch as Batch
from dpoptax.samplers.protocol import Sampler as Sampler
from dpoptax.samplers.protocol import SamplerState as SamplerState
from dpoptax.samplers.shuffled import Shuffled as Shuffled
from dpoptax.samplers.stages import Stages as Stages
from dpoptax.samplers.users import Users as Users
