"""Microbatches of a batch: which rows each of them takes, on one device and on many."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from dpoptax._pytree import PyTree


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a batch is cut into parts of `size` examples.

    A batch that is sharded over devices consists of as many runs of rows. Each part takes equally
    many rows from every run: so all devices work, and no row moves to another device. With one run
    the parts are runs of rows themselves, and padding at the end of a batch fills whole parts.

    Attributes:
        size: how many examples a part has.
        lanes: the number of runs, a divisor of `size` and of the size of the batch.
    """

    size: int
    lanes: int

    def cut(self, rows: PyTree) -> PyTree:
        """Returns arrays `(lanes, parts, rows of a lane in a part, ...)` from `(batch, ...)`.

        Copies of the last row of a lane fill its last part.
        """

        def one(leaf: Array) -> Array:
            # No -1 among the sizes: a leaf may have no numbers.
            length = leaf.shape[0] // self.lanes
            by_lane = leaf.reshape(self.lanes, length, *leaf.shape[1:])
            # Copies of a real row, because zeros may be outside of what the loss accepts.
            if missing := -length % self._rows:
                shape = (self.lanes, missing, *leaf.shape[1:])
                copies = jnp.broadcast_to(by_lane[:, -1:], shape)
                by_lane = jnp.concatenate([by_lane, copies], axis=1)
            parts = by_lane.shape[1] // self._rows
            return by_lane.reshape(self.lanes, parts, self._rows, *leaf.shape[1:])

        return jax.tree.map(one, rows)

    def is_real(self, mask: Array) -> Array:
        """Returns the mask of the cut rows, in which copies are padding."""
        cut = self.cut(mask)
        _, parts, rows = cut.shape
        places = jnp.arange(parts * rows).reshape(parts, rows)
        return cut & (places < len(mask) // self.lanes)

    def part(self, cut: PyTree, number: Array | int) -> PyTree:
        """Returns the rows of one part, `(size, ...)`."""

        def one(leaf: Array) -> Array:
            rows = jax.lax.dynamic_index_in_dim(leaf, number, axis=1, keepdims=False)
            return rows.reshape(self.size, *leaf.shape[3:])

        return jax.tree.map(one, cut)

    def join(self, parts: PyTree, batch: int) -> PyTree:
        """Reverses `cut`, for arrays `(parts, size, ...)`."""

        def one(leaf: Array) -> Array:
            parts, rest = leaf.shape[0], leaf.shape[2:]
            by_part = leaf.reshape(parts, self.lanes, self._rows, *rest)
            by_lane = jnp.moveaxis(by_part, 1, 0).reshape(self.lanes, parts * self._rows, *rest)
            return by_lane[:, : batch // self.lanes].reshape(batch, *leaf.shape[2:])

        return jax.tree.map(one, parts)

    @property
    def _rows(self) -> int:
        return self.size // self.lanes


def parts_of(examples: PyTree, batch: int, size: int, shards: int | None = None) -> Parts:
    """Returns the parts of a batch, by the number of devices that share its rows, if known."""
    if shards is None:
        shards = max((num_shards(leaf)[0] for leaf in jax.tree.leaves(examples)), default=1)
    # More lanes than devices do no harm: each device then holds several lanes.
    return Parts(size, math.gcd(shards, size, batch))


def refuse_uneven(size: int, examples: PyTree) -> None:
    """Raises if a microbatch cannot take equally many rows from every device."""
    leaves = [leaf for leaf in jax.tree.leaves(examples) if isinstance(leaf, jax.Array)]
    for leaf in leaves:
        shards, is_known = num_shards(leaf)
        if is_known and size < leaf.shape[0]:
            check_divides(size, shards)


def check_divides(size: int, shards: int) -> None:
    """Raises if the size of a microbatch is not a multiple of the number of devices."""
    if size % shards:
        raise ValueError(
            "microbatch_size counts examples of the whole batch, and each microbatch takes equally "
            f"many from every device. So it must be a multiple of {shards}, the number of devices "
            f"that share the batch; got {size}. Pass {-(-size // shards) * shards}, say."
        )


def shards_of(sharding: jax.sharding.Sharding | None, batch: int) -> int | None:
    """Returns how many devices share a batch with this sharding; None if that is not known."""
    if sharding is None:
        return None
    try:
        return batch // sharding.shard_shape((batch,))[0]
    except ValueError:  # it does not divide evenly, and `sharded_take` says what to change
        return None


def num_shards(leaf: Any) -> tuple[int, bool]:
    """Returns how many devices share the rows of an array, and whether that is certain.

    A compiled function sees explicit axes only. For automatic ones this is the largest number that
    the mesh allows.
    """
    if not isinstance(leaf, jax.Array) or leaf.ndim == 0 or not leaf.shape[0]:
        return 1, True
    if not isinstance(leaf, jax.core.Tracer):
        return leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0], True
    sharding = jax.typeof(leaf).sharding
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh.empty else sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    automatic = [name for name, kind in kinds.items() if kind == AxisType.Auto]
    first = sharding.spec[0] if len(sharding.spec) else None
    explicit = () if first is None else first if isinstance(first, tuple) else (first,)
    return math.prod(mesh.shape[name] for name in (*automatic, *explicit)), not automatic
