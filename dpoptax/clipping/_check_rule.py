"""Check of a clip rule of the user's own: its weights, at a few norms, must keep the three laws."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax.schedules import as_schedule

# Norms around the bound, and far from it on both sides.
_NORMS = (0.0, 0.01, 0.5, 0.99, 1.01, 2.0, 30.0, 1e4)
# Float32 rounds norms and weights. A rule that does not clip is far beyond this.
_TOLERANCE = 1e-3


def check_rule(rule: Any) -> None:
    """Raises for a rule that breaks a law at some made-up norms.

    This finds mistakes and proves nothing. A rule that asks for the norms of certain parameters
    cannot be tried here, and is not checked.

    Raises:
        ValueError: a weight scales a gradient to more than the bound, is not zero for a norm that
            is not finite, or depends on other examples.
    """
    bound = float(as_schedule(rule.l2_clip).values[0])
    name = type(rule).__name__
    scale = bound if 0 < bound < math.inf else 1.0
    norms = np.array([*(scale * norm for norm in _NORMS), math.inf, math.nan], np.float32)
    try:
        # Also in a function that is being traced.
        with jax.ensure_compile_time_eval():
            together = _weights(rule, norms)
            singles = [_weights(rule, norms[i : i + 1]) for i in range(len(norms))]
    except Exception:  # of whatever kind the rule raises, for a tree that it does not know
        return
    if together.shape != norms.shape or any(single.shape != (1,) for single in singles):
        raise ValueError(
            f"weights must return one number per example; got shape {together.shape} from {name} "
            f"for {len(norms)} examples. Combine the norms of all parameters first."
        )
    alone = np.concatenate(singles)
    if np.any(alone[-2:] != 0):
        raise ValueError(
            f"a clip rule must give weight 0 to a norm that is not finite; got another one from "
            f"{name}. Return jnp.where(jnp.isfinite(squared), weight, 0.0)."
        )
    if np.any(~(alone >= 0)) or np.any(alone[:-2] * norms[:-2] > (1 + _TOLERANCE) * bound):
        raise ValueError(
            "a clip rule must scale every gradient to at most l2_clip, by weights of zero or more; "
            f"got weights from {name} that do not. squared_norms are squares: take their root."
        )
    if not np.allclose(together, alone, rtol=_TOLERANCE, atol=1e-6):
        raise ValueError(
            f"the weight of an example must depend on its own norms only; got a rule {name} whose "
            "weights depend on the other examples of the batch. Use a public number in their place."
        )


def _weights(rule: Any, norms: np.ndarray) -> np.ndarray:
    # Overflow to infinity is meant: the square of a large norm is not finite either.
    with np.errstate(over="ignore"):
        squares = jnp.asarray(norms**2)
    return np.asarray(rule.weights({"all": squares}, 0))
