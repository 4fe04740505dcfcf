"""Meshes with explicit axes: the library works on them as on automatic ones.

With explicit axes, a sharding is part of the type of an array, and JAX refuses an operation whose
result could be sharded in several ways. Sums over a sharded batch are such operations. So we run
them with automatic axes, where the compiler decides, and say how the results are sharded.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dpoptax._pytree import PyTree


def explicit_mesh(*trees: PyTree) -> AbstractMesh | None:
    """Returns the mesh with explicit axes that an array, or else the context, has; None if none."""
    found = [_mesh_of(leaf) for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
    for mesh in (*found, jax.sharding.get_abstract_mesh()):
        if mesh is not None and is_explicit(mesh):
            return mesh
    return None


def is_explicit(mesh: Any) -> bool:
    """Whether a mesh has an explicit axis."""
    return AxisType.Explicit in mesh.axis_types


# From the shapes of a result to how each leaf of it is sharded.
SpecsOf: TypeAlias = Callable[[PyTree], PyTree]
Function = TypeVar("Function", bound=Callable[..., Any])


def run_with_automatic_axes(
    function: Callable[..., Any],
    *args: PyTree,
    specs_of: SpecsOf,
    mesh: AbstractMesh | None = None,
) -> Any:
    """Returns `function(*args)`, which runs with automatic axes if an array has explicit ones.

    Args:
        function: returns a tree of arrays.
        args: its arguments. What is no JAX array stays as it is.
        specs_of: returns how each leaf of the result is sharded, from the result's shapes.
        mesh: a mesh with explicit axes for the result, if the arguments have none.
    """
    leaves, structure = jax.tree.flatten(args)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    arrays = [leaves[place] for place in places]
    mesh = explicit_mesh(arrays) or mesh
    if mesh is None or not arrays:
        return function(*args)

    structures = []

    # Two traces of a function may give equal trees whose static parts do not compare as equal. So
    # JAX sees the leaves of the result only.
    def run(arrays: list[Any]) -> list[Any]:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        found, result = jax.tree.flatten(function(*jax.tree.unflatten(structure, filled)))
        structures.append(result)
        return found

    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    with jax.sharding.use_abstract_mesh(_automatic(mesh)):
        try:
            shapes_of_results = jax.eval_shape(run, shapes)
        except ValueError as error:
            _explain_automatic_axes(error)
            raise
    results = jax.tree.unflatten(structures[-1], shapes_of_results)
    specs = jax.tree.leaves(specs_of(results))
    with jax.sharding.use_abstract_mesh(mesh):
        found = jax.sharding.auto_axes(run, out_sharding=specs)(arrays)
    return jax.tree.unflatten(structures[-1], found)


def _automatic(mesh: AbstractMesh) -> AbstractMesh:
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)


def _explain_automatic_axes(error: ValueError) -> None:
    """Raises an error with the remedy if a function needs the explicit axes of its mesh."""
    if "of type Auto" in str(error) or "should match the mesh passed to shard_map" in str(error):
        raise ValueError(
            "expected a loss that runs with automatic axes, because dpoptax computes per-example "
            "gradients with them also on a mesh with explicit axes; got one that needs explicit "
            "axes. Use jax.lax.with_sharding_constraint in place of out_sharding= and "
            "jax.sharding.reshard. Call jax.shard_map without mesh=, inside jax.set_mesh(mesh). "
            f"JAX says: {error}"
        ) from error


def replicated_results(function: Function) -> Function:
    """Runs a function with automatic axes; every device has the results."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return run_with_automatic_axes(
            lambda args, kwargs: function(*args, **kwargs), args, kwargs, specs_of=_replicated
        )

    return cast(Function, wrapped)


def of_shapes(function: Function) -> Function:
    """Runs a function that reads shapes only; arrays with explicit axes become their shapes."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        mesh = explicit_mesh(args, kwargs)
        if mesh is None:
            return function(*args, **kwargs)

        def shape_of(leaf: Any) -> Any:
            is_array = isinstance(leaf, jax.Array)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf

        args, kwargs = jax.tree.map(shape_of, (args, kwargs))
        with jax.sharding.use_abstract_mesh(_automatic(mesh)):
            return function(*args, **kwargs)

    return cast(Function, wrapped)


def by_example(grads_fn: Function) -> Function:
    """Runs a function of a batch with automatic axes; results are sharded as the examples are."""

    @functools.wraps(grads_fn)
    def wrapped(params: PyTree, examples: PyTree, **kwargs: Any) -> Any:
        return run_with_automatic_axes(
            lambda params, examples, kwargs: grads_fn(params, examples, **kwargs),
            *(params, examples, kwargs),
            specs_of=sharded_by_example(params, examples),
        )

    return cast(Function, wrapped)


def sharded_results(take: Function, sharding: Any) -> Function:
    """Runs a function of data and batch with automatic axes; its results get a sharding."""

    @functools.wraps(take)
    def wrapped(data: PyTree, batch: Any) -> Any:
        mesh = _mesh_in_use(sharding, data)
        if mesh is None:
            return take(data, batch)
        return run_with_automatic_axes(
            take,
            *(data, batch),
            specs_of=lambda results: jax.tree.map(lambda _: sharding.spec, results),
            mesh=mesh,
        )

    # `fit` runs with automatic axes, and reads here whether the mesh has explicit ones.
    wrapped.sharding = sharding  # type: ignore[attr-defined]
    return cast(Function, wrapped)


def _mesh_in_use(sharding: Any, data: PyTree) -> AbstractMesh | None:
    """Returns the mesh of a sharding, if it is used with explicit axes here."""
    if not isinstance(sharding, NamedSharding) or not is_explicit(sharding.mesh):
        return None
    # Arrays that are on the mesh already, or the context, say which kind of axes is in use.
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(data)]
    used = [mesh for mesh in (*meshes, jax.sharding.get_abstract_mesh()) if not mesh.empty]
    return sharding.mesh.abstract_mesh if not used or is_explicit(used[0]) else None


def _replicated(results: PyTree) -> PyTree:
    return jax.tree.map(lambda _: PartitionSpec(), results)


def sharded_like(tree: PyTree | None) -> SpecsOf:
    """Returns `specs_of` for results that are sharded like the leaves of a tree; None replicates.

    The results must have the structure of the tree.
    """

    def specs_of(results: PyTree) -> PyTree:
        return _replicated(results) if tree is None else jax.tree.map(_spec_of_array, tree)

    return specs_of


def sharded_by_example(params: PyTree, examples: PyTree) -> SpecsOf:
    """Returns `specs_of` for results of a batch: only its axis of examples is sharded.

    The recomputed form also returns what its second backward pass needs: arrays of the shape of a
    parameter, which are sharded as the parameter is, and inputs of layers, where the axis of
    examples comes after the axes of scans.
    """
    like_params = {
        jax.numpy.shape(leaf): _spec_of_array(leaf)
        for leaf in jax.tree.leaves(params)
        if jax.numpy.ndim(leaf) > 1
    }
    leaves = [leaf for leaf in jax.tree.leaves(examples) if jax.numpy.ndim(leaf)]
    specs = [_spec_of_array(leaf) for leaf in leaves]
    split = [spec[0] for spec in specs if len(spec) and spec[0] is not None]
    # Without arrays of examples nothing is sharded. The loss is checked later.
    size = leaves[0].shape[0] if leaves else None

    def spec_of(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        # Wherever an array is: a wrong guess costs time and memory, and changes no number.
        if split and leaf.shape[:1] == (size,):
            return PartitionSpec(split[0])
        if leaf.shape in like_params:
            return like_params[leaf.shape]
        if not split or size not in leaf.shape:
            return PartitionSpec()
        return PartitionSpec(*[None] * leaf.shape.index(size), split[0])

    return lambda results: jax.tree.map(spec_of, results)


def _spec_of_array(leaf: Any) -> PartitionSpec:
    """Returns how an array with explicit axes is sharded; replicated if it has none."""
    return jax.typeof(leaf).sharding.spec if _mesh_of(leaf) is not None else PartitionSpec()


def to_automatic(tree: PyTree) -> PyTree:
    """Returns arrays with the same sharding on a mesh with automatic axes, without a copy."""
    return jax.tree.map(lambda leaf: _relabel(leaf, automatic_sharding), tree)


def to_explicit(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Reverses `to_automatic`."""
    automatic = automatic_mesh(mesh)

    def explicit(sharding: Any) -> Any:
        on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh == automatic
        return NamedSharding(mesh, sharding.spec) if on_mesh else sharding

    return jax.tree.map(lambda leaf: _relabel(leaf, explicit), tree)


def automatic_sharding(sharding: Any) -> Any:
    """Returns the same sharding on a mesh with automatic axes."""
    if not isinstance(sharding, NamedSharding) or not is_explicit(sharding.mesh):
        return sharding
    return NamedSharding(automatic_mesh(sharding.mesh), sharding.spec)


def automatic_mesh(mesh: Any) -> jax.sharding.Mesh:
    """Returns the same mesh of devices with automatic axes."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def concrete_explicit_mesh(*values: Any) -> jax.sharding.Mesh | None:
    """Returns the mesh with explicit axes of arrays, of shardings, or of the context."""
    candidates = [getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves(values)]
    meshes = [one.mesh for one in candidates if isinstance(one, NamedSharding)]
    for mesh in (*meshes, jax.sharding.get_mesh()):
        if isinstance(mesh, jax.sharding.Mesh) and not mesh.empty and is_explicit(mesh):
            return mesh
    return None


def _relabel(leaf: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return leaf
    sharding = change(leaf.sharding)
    # The same devices hold the same parts, so nothing moves.
    return leaf if sharding is leaf.sharding else jax.device_put(leaf, sharding)


def _mesh_of(leaf: Any) -> AbstractMesh | None:
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return None if mesh is None or mesh.empty or not is_explicit(mesh) else mesh
