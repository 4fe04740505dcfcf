"""Adapters inside layers that are scanned or recomputed: per-example gradients are the smallest.

A scan or a checkpoint leaves two ways to the norms: keep the factors of all layers, or run the
backward pass twice. Adapters of low rank have a third one. Their per-example gradients are much
smaller than their factors, and plain differentiation gives them in the pass that runs anyway.
"""

import math

from dpoptax.per_example._loss_trace import LossProgram

# How much smaller than the factors the gradients must be. For a product of rank r on T tokens they
# are r / T of them, so rank 8 needs 128 tokens. Whole layers get there at about 6,000 tokens, where
# one gradient takes the memory of a layer's input. Measured for the decoder of `docs/trainers/
# lora.md`: without this, scanned layers take 1.04 times the memory of a plain step, and layers
# under `jax.checkpoint` 1.4 times the multiplications.
SMALL = 1 / 16


def are_small(program: LossProgram) -> bool:
    """Whether the stacked form is the cheapest one for the parameters of a loss."""
    found = program.found
    # A stacked gradient of a kernel is slow, and NaN in it takes a second pass.
    if found.may_spread_nan or not any(site.scans or site.in_checkpoint for site in found.sites):
        return False
    # The gradient of a weight that all turns of a scan share would be read and written every turn.
    if any(not scan.sliced for site in found.sites for scan in site.scans):
        return False
    gradients = sum(math.prod(spec.shape) for spec in program.param_specs)
    return gradients <= SMALL * sum(site.num_floats for site in found.sites)
