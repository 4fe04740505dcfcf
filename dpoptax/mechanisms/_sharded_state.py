"""Sharding of the state of a mechanism: arrays like the parameters lie where the parameters do.

The state may have several arrays per parameter, also stacked along a leading axis. On many devices
none of them may be whole on one device, not even for a moment.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dpoptax._pytree import PyTree


def sharded_like_parameters(init: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Returns `init(params)`, with each part that is like the parameters sharded as they are.

    Such a part has the structure of the parameters, and arrays of their shapes, perhaps with one
    more axis before. Nothing is sharded if the parameters are on no mesh, or are traced.
    """
    spread = [leaf for leaf in jax.tree.leaves(params) if len(_mesh_axes(leaf)) > 0]
    if not spread:
        return init(params)
    structure: Any = jax.tree.structure(params)

    def is_part(node: Any) -> bool:
        return bool(jax.tree.structure(node) == structure)

    everywhere = NamedSharding(spread[0].sharding.mesh, PartitionSpec())

    def shardings(node: Any) -> PyTree:
        if not is_part(node):
            return everywhere
        return jax.tree.map(lambda leaf, param: _sharding(leaf, param, everywhere), node, params)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    found = jax.tree.map(shardings, jax.eval_shape(init, shapes), is_leaf=is_part)
    return jax.jit(lambda: init(shapes), out_shardings=found)()


def _mesh_axes(leaf: Any) -> tuple[str, ...]:
    """The axes of the mesh that an array is on; none if it is traced, or on no mesh."""
    if isinstance(leaf, jax.core.Tracer):
        return ()
    sharding = getattr(leaf, "sharding", None)
    return tuple(sharding.mesh.axis_names) if isinstance(sharding, NamedSharding) else ()


def _sharding(leaf: Any, param: Any, everywhere: NamedSharding) -> NamedSharding:
    if not isinstance(getattr(param, "sharding", None), NamedSharding):
        return everywhere
    spec = param.sharding.spec
    if leaf.shape == param.shape:
        return NamedSharding(param.sharding.mesh, spec)
    if leaf.shape[1:] == param.shape:
        return NamedSharding(param.sharding.mesh, PartitionSpec(None, *spec))
    return everywhere
