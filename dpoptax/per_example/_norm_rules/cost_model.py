"""Cost model: the constants that decide which program computes the norms and sums of a leaf.

Costs count multiplications of a large matrix product; other work counts more, by the factors below.
A wrong constant makes a model slower, never wrong. The timings in the comments were read with
JAX 0.10.2 on an x86-64 CPU with 2 busy cores (programs in turn, the best of many runs): trust
ratios of two or more. Nothing here was measured on an accelerator.
"""

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

# The same on an accelerator (256 MiB), where only memory limits a chunk and larger products use
# more of the device. Not measured.
ACCELERATOR_CHUNK_FLOATS = 2**26
