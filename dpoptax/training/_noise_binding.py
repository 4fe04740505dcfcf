"""Binding of the noise to the run: a run with another loss, optimizer or data draws other noise.

Two releases of different gradients under one noise reveal the exact difference of the gradients.
That happens when one key serves two runs, as in a sweep with one seed. So the noise key of a step
is derived from the key of the step before, and from

- the program: the gradient of the loss of one example, and the update of the transformation,
- the initial parameters and the initial state of the optimizer,
- the examples of the batch, bit by bit, and their indices,
- the key of the loss, if it takes one.

The keys form a chain, so a difference in one step changes the noise of all later steps. A run that
repeats another bit for bit draws the same noise: it is the same release. Nothing here depends on
the number of devices or the size of microbatches. Padded rows do not count. A mesh in the context
(`jax.set_mesh`) shows in the lowered program, so a run inside it draws other noise.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, UInt32

from dpoptax import _markers, _validate
from dpoptax._pytree import PyTree
from dpoptax.transforms._privatize import PrivatizeState

# Odd multipliers of murmur3 and of the golden ratio. They only have to mix bits.
_MIX = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35))
_GOLDEN = np.uint32(0x9E3779B9)


def bind_noise(
    opt_state: optax.OptState, values: PyTree, *, program: str, mask: Array | None = None
) -> optax.OptState:
    """Returns the state with noise keys that are derived from a program and the bits of a tree.

    Args:
        opt_state: contains the `PrivatizeState`; all else stays as it is.
        values: a tree of arrays and keys.
        program: a digest of what computes the gradients.
        mask: bool `(batch,)`, for values with a leading axis of the batch; other rows are left out.

    Returns:
        A state of the same structure.
    """

    def bind(node: Any) -> Any:
        if not isinstance(node, PrivatizeState):
            return node
        return node._replace(key=bind_key(node.key, values, program, mask))

    return jax.tree.map(bind, opt_state, is_leaf=lambda node: isinstance(node, PrivatizeState))


def bind_key(
    key: PRNGKeyArray, values: PyTree, program: str, mask: Array | None = None
) -> PRNGKeyArray:
    """Derives a key from a key, a tree and a program; see `bind_noise`."""
    if _markers.active():
        return _markers.bound_key(key, values)
    salts = np.frombuffer(hashlib.sha256(program.encode()).digest()[:8], "<u4")
    # The seeds are secret, so nobody can prepare two data sets with one digest. The digest only
    # chooses a key, and is never shown.
    seeds = jax.random.key_data(key).reshape(-1)[:2]
    for word, salt in zip(digest(values, seeds, mask), salts, strict=True):
        key = jax.random.fold_in(key, word ^ salt)
    return key


def digest(
    values: PyTree, seeds: UInt32[Array, "2"], mask: Array | None = None
) -> tuple[Array, Array]:
    """Returns two uint32 words: a hash of all bits of a tree, under two seeds.

    Each word sums, over all elements, a mix of the element, its position and the seeds. Integers
    sum exactly in any order, so any number of devices finds the same words.
    """
    first = second = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(values)):
        if _validate.is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if jnp.size(leaf):
            words = _digest_leaf(jnp.asarray(leaf), seeds, mask, np.uint32(number))
            first, second = first + words[0], second + words[1]
    if isinstance(first, jax.core.Tracer):
        return first, second
    # Through the host: the values may be on many devices, and the key is on one.
    return jnp.asarray(np.asarray(first)), jnp.asarray(np.asarray(second))


@jax.jit
def _digest_leaf(
    leaf: Array, seeds: Array, mask: Array | None, number: Array
) -> tuple[Array, Array]:
    words = _words(leaf)
    position = number * _GOLDEN + seeds[0]
    stride = 1
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + index * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    place = _mix(position)
    found = [_mix(words ^ place), _mix((words + place) * _GOLDEN ^ seeds[1])]
    if mask is not None:
        rows = mask.reshape(-1, *[1] * (words.ndim - 1))
        found = [jnp.where(rows, word, np.uint32(0)) for word in found]
    # One reduction for both: a CPU then computes the words once, in one loop. Two reductions take
    # four times as long.
    zeros = (np.uint32(0), np.uint32(0))
    first, second = jax.lax.reduce(tuple(found), zeros, _add_pairs, tuple(range(words.ndim)))
    return first, second


def _add_pairs(total: tuple[Array, Array], words: tuple[Array, Array]) -> tuple[Array, Array]:
    return total[0] + words[0], total[1] + words[1]


def _mix(words: Array) -> Array:
    """The last steps of murmur3: every bit of the input changes about half of the output."""
    for multiplier in _MIX:
        words = (words ^ (words >> np.uint32(16))) * multiplier
    return words ^ (words >> np.uint32(16))


def _words(leaf: Array) -> Array:
    """Returns the bits of an array as uint32, different for different values."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return _words(jnp.stack([leaf.real, leaf.imag], axis=-1))
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        if jnp.iinfo(leaf.dtype).bits == 64:
            return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        return leaf.astype(jnp.uint32)
    bits = jnp.finfo(leaf.dtype).bits
    if bits < 8:
        return _words(leaf.astype(jnp.float32))
    same_size = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, same_size).astype(jnp.uint32)
