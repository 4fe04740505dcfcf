"""Microbatches that a CPU computes faster than the whole batch.

Between the forward and the backward pass, the activations of the whole batch lie in memory. If they
are much larger than the cache, every operation waits for memory, and a loop over small parts is
faster than the whole batch at once. Measured at 128 examples on two cores, in units of the gradient
without privacy: a transformer 0.66 in parts of 8 and 1.38 at once, an LSTM 1.2 in parts of 32 and
1.48, adapters in a frozen transformer 0.47 in parts of 8 and 1.02. XLA allocates the memory of a
step in each call, and glibc keeps up to 32 MiB of it for the next call, which is part of the gain.

A model that does little but look up rows of a table waits for the gradients of these rows in the
same way. Measured with 256 lookups per example in a table of 10,004 rows, and 1,024 examples: 1.96
in parts of 128 and 5.4 at once for rows of 16 numbers, 1.5 in parts of 30 and 2.3 for rows of 100.
"""

import math
from typing import Any

import jax

from dpoptax import _validate
from dpoptax._jax_compat import contains_primitive, inner_jaxprs
from dpoptax.per_example._batch_sum import CHUNK, RUN
from dpoptax.per_example._devices import is_single_cpu
from dpoptax.per_example._loss_trace import LossProgram
from dpoptax.per_example._microbatched import LARGEST_AUTOMATIC

# The activations of a part, counted before XLA fuses operations: it writes about half of them.
# Parts of half or twice as many bytes take 0.85 to 1.15 of the time, depending on the model.
BYTES_OF_PART = 72 * 2**20

# The same for models with convolutions, which hold patches besides. Measured with parts of about
# this size, and at once: 128 images of CIFAR-10 0.81 and 1.36, 512 of them 0.43 and 0.88, 1,024 of
# MNIST 0.69 and 1.19.
BYTES_OF_CONVOLUTIONS = 2**23

# A batch is cut only if its activations are this many times as large. At 2.0 times, a VAE in two
# parts takes 1.03 times as long, and at 2.4 times a transformer 0.91 of the time.
LEAST_RATIO = 2.2

# Each part adds its sum to that of the batch. This is cheap beside the products if each parameter
# multiplies at least so many rows of a part.
LEAST_ROWS = 64

# Larger parts are about equal. The size of smaller ones is a power of two, which divides most
# batches and fills vectors. Measured: parts of 12 examples of a transformer take 1.4 times as long
# as parts of 8 or 16, parts of 24 of 128 examples of an LSTM 1.1 times as long as 16, 32 or 43.
MANY_ROWS = 32

# Looked-up rows of a part: each is written and read several times. Measured with 256 rows of 16
# numbers: 176 examples take 0.86 of the time in two parts, and 128 examples 1.18 times.
BYTES_OF_LOOKUPS = 2**21
LEAST_PARTS = 1.4

# Each part also adds the gradients of all parameters, so it looks up at least this part of their
# bytes. With 16 MB of parameters, a batch in parts takes up to 5 times as long as at once, and with
# 2,731 examples in a part, which are several chunks of the sum, 2.5 times.
LEAST_PART_OF_PARAMS = 0.75
LARGEST_PARAMS = 2**23
MOST_LOOKING_UP = RUN * CHUNK


def size_of_parts(
    program: LossProgram,
    batch: int,
    flops: float,
    lookup_bytes: float = 0.0,
    *,
    usual: int | None = None,
) -> int | None:
    """Returns how many examples a part has; None if the batch is faster as a whole.

    Args:
        program: the loss.
        batch: how many rows the batch has.
        flops: of one example.
        lookup_bytes: of the rows that one example looks up in tables of parameters.
        usual: how many rows most batches need; None for all. They fill whole parts, because parts
            with only padding cost nothing.
    """
    usual = batch if usual is None else usual
    # Devices that share a batch also share its activations, and have other caches. On a mesh, also
    # of one device, a microbatch is for those who ask for it.
    if not is_single_cpu():
        return None
    convolves = contains_primitive(program.jaxpr, jax.lax.conv_general_dilated_p)
    of_part = BYTES_OF_CONVOLUTIONS if convolves else BYTES_OF_PART
    of_example = activation_bytes(program.jaxpr)
    num_params = sum(math.prod(spec.shape) for spec in program.param_specs)
    if 2 * lookup_bytes >= of_example > 0:
        # Gradients are float32, whatever the parameters are.
        return _size_for_lookups(batch, usual, lookup_bytes, 4 * num_params)
    if of_example * batch < LEAST_RATIO * of_part:
        return None
    # Six operations for each parameter and row: three products of a multiplication and an addition.
    rows = max(flops / (6 * max(1, num_params)), 1e-9)
    size = max(of_part / of_example, LEAST_ROWS / rows)
    if size >= MANY_ROWS:
        return None if batch < 1.5 * size else _equal(usual, max(2, round(usual / size)))
    size = 2 ** round(math.log2(max(size, 1)))
    return size if size < batch else None


def _size_for_lookups(batch: int, usual: int, lookup_bytes: float, param_bytes: int) -> int | None:
    least = max(1.0, LEAST_PART_OF_PARAMS * param_bytes / lookup_bytes)
    if param_bytes > LARGEST_PARAMS or least > MOST_LOOKING_UP:
        return None
    if batch * lookup_bytes / BYTES_OF_LOOKUPS < LEAST_PARTS or usual < 2 * least:
        return None
    parts, most = usual * lookup_bytes / BYTES_OF_LOOKUPS, math.floor(usual / least)
    # Larger parts than the cache holds are not worth the double words that add more than a run.
    if most < parts:
        return _equal(usual, most if most >= 2 * RUN else min(most, RUN))
    return _equal(usual, max(2, math.ceil(parts)))


def _equal(rows: int, parts: int) -> int:
    """Returns the size of equal parts; of more parts if these would be too large."""
    return -(-rows // max(parts, -(-rows // LARGEST_AUTOMATIC)))


def activation_bytes(jaxpr: Any) -> int:
    """Returns how many bytes all operations of one example write, loops multiplied out."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = inner_jaxprs(eqn)
        turns = eqn.params.get("length", 1) if eqn.primitive is jax.lax.scan_p else 1
        total += turns * sum(map(activation_bytes, inner))
        if not inner:
            total += sum(_bytes(out.aval) for out in eqn.outvars)
    return total


def _bytes(aval: Any) -> int:
    # Keys have no size in bytes, and are small.
    is_array = hasattr(aval, "shape") and not _validate.is_key(aval)
    return math.prod(aval.shape) * aval.dtype.itemsize if is_array else 0
