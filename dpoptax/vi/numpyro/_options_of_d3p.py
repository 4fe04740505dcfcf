"""Options of d3p that work in another way here."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

_NAME = "num_obs_total"
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


def pass_num_obs_total(
    model: Callable[..., Any], guide: Callable[..., Any], kwargs: dict[str, Any], num_examples: int
) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """Passes the number of examples to those of model and guide that have such an argument."""
    if _NAME in kwargs or not (takes(model) or takes(guide)):
        return model, guide, kwargs
    if isinstance(_inner(guide), AutoGuide) and takes(model) != takes(guide):
        return model, guide, kwargs
    kwargs = {**kwargs, _NAME: num_examples}
    return _accepting(model), _accepting(guide), kwargs


def takes(function: Any, *, by_keywords: bool = False) -> bool:
    """Whether a model or guide has the argument, or with `by_keywords` takes any keyword."""
    function = _inner(function)
    if isinstance(function, AutoGuide):
        return takes(function.model, by_keywords=by_keywords)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False
    takes_all = any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    return _NAME in parameters or (by_keywords and takes_all)


def _accepting(function: Callable[..., Any]) -> Callable[..., Any]:
    if takes(function, by_keywords=True):
        return function

    def without(*args: Any, num_obs_total: int, **kwargs: Any) -> Any:
        del num_obs_total
        return function(*args, **kwargs)

    return without


def _inner(function: Any) -> Any:
    while isinstance(function, Messenger) and function.fn is not None:
        function = function.fn
    return function
