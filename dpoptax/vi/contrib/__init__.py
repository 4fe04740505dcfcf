"""Variational inference tools that are specific to one paper or one guide family.

They may change faster than the rest of `dpoptax.vi`. All of them are post-processing or keep the
guarantee of the transformation that they wrap.
"""

from dpoptax.vi.contrib._averaging import average_iterates, polyak_average
from dpoptax.vi.contrib._gradient_trace import noise_aware_posterior, trace_gradients
from dpoptax.vi.contrib._natural_gradient import natural_gradient
from dpoptax.vi.contrib._scale_before_clip import mean_field_scale, scale_before_clip
from dpoptax.vi.contrib._synthetic_estimates import combine_synthetic_estimates

__all__ = [
    "scale_before_clip",
    "mean_field_scale",
    "natural_gradient",
    "average_iterates",
    "polyak_average",
    "trace_gradients",
    "noise_aware_posterior",
    "combine_synthetic_estimates",
]
