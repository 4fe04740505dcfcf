"""Variational inference tools that are specific to one paper or one guide family.

They may change faster than the rest of `dpoptax.vi`. All of them are post-processing or keep the
guarantee of the transformation that they wrap.
"""

from dpoptax.vi.contrib._gradient_trace import noise_aware_posterior, trace_gradients
from dpoptax.vi.contrib._mean_field_scale import mean_field_scale
from dpoptax.vi.contrib._natural_gradient import natural_gradient
from dpoptax.vi.contrib._synthetic_estimates import combine_synthetic_estimates

__all__ = [
    "mean_field_scale",
    "natural_gradient",
    "trace_gradients",
    "noise_aware_posterior",
    "combine_synthetic_estimates",
]
