"""Options of d3p that work in another way here."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

_REMEDIES = {
    "rng_suite": (
        "The type of the key decides which generator draws the noise: leave it out, and start from "
        "dpoptax.random.secure_key()."
    ),
    "clip_unscaled_observations": (
        "Gradients are always clipped without the scale of plate and handlers.scale, which is "
        "d3p's default: leave it out."
    ),
}


def refuse_options_of_d3p(kwargs: Mapping[str, Any]) -> None:
    """Refuses options that would become arguments of the model."""
    for name, remedy in _REMEDIES.items():
        if name in kwargs:
            raise TypeError(f"DPSVI has no argument {name!r}, an option of d3p. {remedy}")


def num_obs_total_of(
    model: Callable[..., Any], guide: Callable[..., Any], num_examples: int
) -> dict[str, int]:
    """Returns the number of examples as an argument, if model and guide both have it."""
    name = "num_obs_total"
    return {name: num_examples} if _takes(model, name) and _takes(guide, name) else {}


def _takes(function: Any, name: str) -> bool:
    while isinstance(function, Messenger) and function.fn is not None:
        function = function.fn
    if isinstance(function, AutoGuide):
        return _takes(function.model, name)
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False
