"""Cost model: the constants that decide which program computes the norms and sums of a leaf.

Costs count multiplications of a large matrix product; other work counts more, by the factors below.
A wrong constant makes a model slower, never wrong.

The constants for CPUs are measured. The timings in the comments were read with JAX 0.10.2 on an
x86-64 CPU with 2 busy cores (programs in turn, the best of many runs): trust ratios of two or more.
Those for other devices are computed from the table in `_devices.py`, by `_of_accelerator`. None of
them was measured.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from dpoptax.per_example._devices import Device, current_device
from dpoptax.per_example._tracing.site import Site

# Gradients of a leaf are held instead of its factors only if those of the whole batch are fewer
# floats than this (32 MiB). Holding saves computing them twice, for the norms and for the sum, but
# they must be written and read again. Measured for products over 64 positions: holding is 1.9x
# faster at 2**21 floats (128 x 128, batch 128) and 1.3x slower at 2**23 (256 x 256, batch 128).
MAX_MATERIALIZED_FLOATS = 2**23

# ... and only if the gradient of an example is at most this many times as large as its factors,
# since memory is what factors are for. Measured as above: holding is 1.6x faster at a ratio of 2
# (batch 16), and 1.1x and 2.5x slower at ratios of 8 and 16.
MAX_MATERIALIZED_RATIO = 4

# ... and only if the norms from factors cost more than this per float of the gradient: each float
# is written and read once. Not measured by itself: the norms of outer products cost far less than
# this, and those of products over many positions far more.
MATERIALIZED_TRAFFIC = 2

# Copying one float of a patch or of a shifted Gram matrix, in multiplications. Larger values favour
# the pixel Gram for small images with many channels. Measured at 3 x 3 windows: the pixel Gram is
# 2x to 10x faster for 4 x 4 and 8 x 8 images with 64 channels or more, and as fast as patches for
# 16 x 16 images with 64 channels, where this cost is 1.5 times that of patches.
PATCH_COPY_COST = 16.0

# Up to this many positions along one side of a window are sliced one by one, more are looked up by
# index: slices make a program that grows with the window and takes longer to compile. Run times
# decide little: at 5, 16, 32 and 64 positions slices take 1.1, 1.3, 0.7 and 0.7 times as long.
MAX_SLICED_WINDOW = 16

# A multiplication of gradients that are computed example by example, in multiplications of one
# large product. It lets every special rule win over `Materialize` unless its cost is 8 times as
# high. Measured: a plain matrix product takes 1.0 to 1.4 times as long as by its own rule, a lookup
# in a table of 10,000 rows 14 times. No single value fits both.
MATERIALIZE_OVERHEAD = 8.0

# A segment sum per float of the cotangents, in multiplications: it sorts nothing, but scatters and
# reads several times. Measured at 128 tokens of width 64: 2 ns per float, against 0.03 ns per
# multiplication of a product of 512 x 512, so it costs about 60 of them; the value decides only
# whether lookups and tied tables are materialized. It must not exceed MATERIALIZE_OVERHEAD, or
# `Materialize` would take over all lookups.
SEGMENT_SUM_COST = 8.0

# A chunk of a segment sum may hold 1 / 8 of the usual number of floats, because the rows, their
# sums and the squares are in the cache at the same time. Measured for 1,024 examples of 128 tokens
# of width 64: at 8 and 32 it is 2.2x faster than at 1 and 2.
SEGMENT_CHUNK_FACTOR = 8

# The floats that a chunk of examples may hold (16 MiB), so that it stays in the cache of a CPU.
# Smaller chunks give smaller products and more turns of a loop. Measured for convolutions of 32
# channels on 32 x 32 and of 128 channels on 8 x 8, batch 64: 2**24 is 2.3x and 4.2x slower; 2**19
# is 1.9x faster for the first and as fast for the second.
CPU_CHUNK_FLOATS = 2**22


class Constants(NamedTuple):
    """What work costs, in multiplications of a large matrix product.

    Attributes:
        product: a float of a product that is squared and dropped.
        gram: a float of the Gram matrices; there are two for one of them.
        copy: copying a float of a patch or of a shifted Gram matrix.
        segment_sum: a segment sum, per float of the cotangents.
        materialize: a multiplication of gradients that are computed example by example.
        materialized: a float of those gradients, which are squared and dropped.
        held: a float of the gradients that are held.
        max_held_ratio: how many times as large as its factors a gradient that is held may be.
        max_held_floats: how many floats the held gradients of a leaf may have.
        chunk_floats: how many floats a chunk of examples may have.
    """

    product: float
    gram: float
    copy: float
    segment_sum: float
    materialize: float
    materialized: float
    held: float
    max_held_ratio: float
    max_held_floats: float
    chunk_floats: int


CPU = Constants(
    product=2.0,
    gram=2.0,
    copy=PATCH_COPY_COST,
    segment_sum=SEGMENT_SUM_COST,
    materialize=MATERIALIZE_OVERHEAD,
    materialized=0.0,
    held=MATERIALIZED_TRAFFIC,
    max_held_ratio=MAX_MATERIALIZED_RATIO,
    max_held_floats=MAX_MATERIALIZED_FLOATS,
    chunk_floats=CPU_CHUNK_FLOATS,
)


def constants(sites: Sequence[Site] = ()) -> Constants:
    """Returns the constants of the device for which the program is traced, for these sites."""
    device = current_device()
    return CPU if device.is_cpu else _of_accelerator(device, narrow=_is_narrow(sites))


def _of_accelerator(device: Device, *, narrow: bool) -> Constants:
    flops = device.narrow_flops if narrow else device.wide_flops
    # A float that is written and read again moves 8 bytes. A multiplication is 2 operations.
    copy = (8 / device.bandwidth) * (flops / 2)
    return Constants(
        product=copy,
        gram=2 * copy,
        copy=copy,
        # It reads the cotangents, and reads and writes the sums.
        segment_sum=2 * copy,
        # Products of single examples may fill half of the matrix unit. An assumption.
        materialize=2.0,
        materialized=copy,
        # Written once, and read for the norms and for the sum.
        held=1.5 * copy,
        # No more memory than factors take, and no more than 1/64 of that of the device.
        max_held_ratio=1.0,
        max_held_floats=device.memory / 4 / 64,
        # Only memory limits a chunk, and larger products use more of the device.
        chunk_floats=int(device.memory / 4 / 64),
    )


def _is_narrow(sites: Sequence[Site]) -> bool:
    """Whether all factors are 16-bit floats, which are multiplied as they are."""
    dtypes = {spec.dtype for site in sites for spec in (*site.operands, site.output)}
    return bool(dtypes) and all(
        jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == 16 for dtype in dtypes
    )
