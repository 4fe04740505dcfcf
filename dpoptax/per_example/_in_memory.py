"""A barrier that holds on every device: what is computed after it reads numbers in memory.

On a CPU, XLA removes `jax.lax.optimization_barrier` before it fuses operations. Two uses of a
number may then compute it twice, and round it differently. A loop has its operands in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def from_memory(function: Callable[[Any], Any], operands: Any, never: Bool[Array, ""]) -> Any:
    """Returns `function(operands)`; each use of an operand reads the same numbers.

    Args:
        function: from a tree of arrays to a tree of arrays.
        operands: what it receives.
        never: False. It depends on arrays, so that the compiler does not know this and keeps the
            loop. If it is True, the result is zero.
    """
    zeros = jax.tree.map(_zeros, jax.eval_shape(function, operands))

    def turn(state: Any) -> Any:
        _, operands, _ = state
        # Work on operands that stay the same in all turns would move out of the loop.
        return jnp.array(True), jax.tree.map(_zeros, operands), function(operands)

    return jax.lax.while_loop(lambda state: ~state[0], turn, (never, operands, zeros))[2]


def _zeros(leaf: Any) -> Array:
    return jnp.zeros(leaf.shape, leaf.dtype)
