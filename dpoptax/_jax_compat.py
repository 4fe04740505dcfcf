"""Differences between JAX versions. No other file may import `jax.extend`.

A jaxpr is JAX's record of a traced function: a list of equations, each of one primitive.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core as jex
from jax.extend.core import primitives
from jax.extend.random import define_prng_impl as define_prng_impl
from jax.extend.random import threefry_prng_impl

from dpoptax._package_classes import is_of_package

# Equations that only run another jaxpr, and the param that holds it.
_CALLS = {
    primitives.jit_p: "jaxpr",
    primitives.closed_call_p: "call_jaxpr",
    primitives.call_p: "call_jaxpr",
}
# With `jax_remat3` a checkpoint is an object, in an equation of a general primitive. JAX exports
# neither, so both are known by name, and looked up in JAX: a primitive of the user may have any.
_OPERATION_PRIMITIVE = "call_hi_primitive"
_CHECKPOINT_OPERATIONS = {"RematTraced"}
# Functions of `jax.numpy` that are such objects.
_PURE_OPERATIONS = {"SearchSorted"}
_CUSTOM_DERIVATIVES = (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)
# Known to JAX, but they talk to other devices, touch mutable arrays, or have no fixed meaning.
_NOT_PURE = """
    all_gather all_to_all axis_index pmax pmin ppermute psum ragged_all_to_all get swap empty2
    custom_lin create_token after_all dce_sink call closed_call rng_uniform cond scan while jit
    remat custom_jvp_call custom_vjp_call linear_solve stage
"""
_numbers = itertools.count()


def mapped_axes() -> tuple[str, ...]:
    """Returns the names of the axes that the running function is mapped over.

    These are the axes of `jax.shard_map` and `jax.pmap`, and named axes of `jax.vmap`.
    """
    names = [str(name) for name in jax.sharding.get_abstract_mesh().manual_axes]
    # Only the axis names of `vmap` need this function, which JAX may remove.
    named = getattr(jex, "unsafe_get_axis_names_DO_NOT_USE", list)
    return tuple(dict.fromkeys([*names, *map(str, named())]))


def current_trace() -> Any:
    """Returns a value that equals another one if both were taken inside one trace.

    Arrays that are computed inside a trace have no meaning outside of it.
    """
    return jex.get_opaque_trace_state()


def register_prng_impl(spec: Any) -> None:
    """Makes a key type known by its name, for libraries that restore keys from files.

    Orbax stores a key with the name of its type, and asks JAX for the type of this name. JAX has
    no public function to register one. Where its registry cannot be found, nothing happens, and
    `dpoptax.random.key_data` remains.
    """
    module = sys.modules.get(type(threefry_prng_impl).__module__)
    register, known = getattr(module, "register_prng", None), getattr(module, "prngs", None)
    impl = getattr(spec, "_impl", None)
    if register is not None and known is not None and impl is not None and impl.name not in known:
        register(impl)


def split_constants(closed: Any) -> tuple[Any, list[Any]]:
    """Returns a closed jaxpr without its constants, and the constants.

    The constants become the first inputs of the jaxpr.
    """
    constants = list(closed.consts)
    # Since JAX 0.12 there is one class for closed and open jaxprs.
    if hasattr(closed, "with_consts"):
        return closed.with_consts(()), constants
    return closed.jaxpr, constants


def inputs_of(jaxpr: Any) -> tuple[list[Any], list[Any]]:
    """Returns all input variables of an open or closed jaxpr, and the values of the first ones."""
    return [*jaxpr.constvars, *jaxpr.invars], list(getattr(jaxpr, "consts", ()))


def run_jaxpr(jaxpr: Any, constants: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Runs what `split_constants` returned, or a jaxpr whose constants are ordinary inputs."""
    inputs = [*constants, *values]
    count = len(jaxpr.constvars)
    if hasattr(jaxpr, "with_consts"):
        return list(jex.jaxpr_as_fun(jaxpr.with_consts(inputs[:count]))(*inputs[count:]))
    return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, inputs[:count]))(*inputs[count:]))


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a number written in the jaxpr, `atom.val`."""
    return isinstance(atom, jex.Literal)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation."""
    outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


class KeyPrimitives(NamedTuple):
    """Primitives on typed keys that JAX does not export."""

    wrap: Any
    unwrap: Any
    clone: Any


@functools.cache
def key_primitives() -> KeyPrimitives:
    """Returns the primitives of `wrap_key_data`, `key_data` and `clone`."""
    key = jax.eval_shape(jax.random.key, 0)
    words = jax.eval_shape(jax.random.key_data, key)
    functions: list[tuple[Any, Any]] = [
        (jax.random.wrap_key_data, words),
        (jax.random.key_data, key),
        (jax.random.clone, key),
    ]
    traced = [jax.make_jaxpr(function)(spec) for function, spec in functions]
    return KeyPrimitives(*(closed.eqns[-1].primitive for closed in traced))


def is_pure(eqn: Any) -> bool:
    """Whether an equation only computes its outputs from its inputs, by a primitive of JAX.

    Primitives that run other jaxprs, such as `scan`, are not among them.
    """
    kind = type(_operation(eqn))
    known = kind.__name__ in _PURE_OPERATIONS and is_of_package(kind, "jax")
    return not eqn.effects and (known or eqn.primitive in _pure_primitives())


@functools.cache
def _pure_primitives() -> frozenset[Any]:
    excluded = _NOT_PURE.split()
    found = {
        name: getattr(module, name)
        for module in (primitives, jax.lax)
        for name in dir(module)
        if name.endswith("_p") and name.removesuffix("_p") not in excluded
    }
    others = (*key_primitives(), ragged_dot_primitive(), _reshard_primitive())
    return frozenset({*found.values(), *others})


def _reshard_primitive() -> Any:
    axes = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axes)
    spec = jax.ShapeDtypeStruct((1,), "float32")
    with jax.sharding.use_abstract_mesh(mesh):
        parts = jax.sharding.PartitionSpec("x")
        (eqn,) = jax.make_jaxpr(lambda x: jax.sharding.reshard(x, parts))(spec).eqns
    return eqn.primitive


def custom_derivative_jaxpr(eqn: Any) -> Any | None:
    """Returns the function of a `custom_jvp` or `custom_vjp` as a jaxpr; else None."""
    if not any(eqn.primitive is one for one in _CUSTOM_DERIVATIVES):
        return None
    return next(_jaxprs([eqn.params.get(name) for name in ("call_jaxpr", "jaxpr", "fun_jaxpr")]))


def define_marker(name: str) -> Any:
    """Returns a primitive that is only traced: its outputs are `params["outputs"]`."""
    marker = jex.Primitive(name)
    marker.multiple_results = True

    def outputs_of(*_: Any, outputs: Any, **__: Any) -> list[Any]:
        return [jax.core.ShapedArray(spec.shape, spec.dtype) for spec in outputs]

    marker.def_abstract_eval(outputs_of)
    return marker


def own_trace_cache() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which JAX reuses no trace from outside, and none from inside later.

    JAX remembers traces by their context. Metadata of the compiler are a part of it.
    """
    context: Callable[..., Any] = set_xla_metadata
    return context(dpoptax_trace=f"{next(_numbers)}")


def frames_of(eqn: Any) -> list[tuple[str, int, str]]:
    """Returns file, line and function of the calls that made an equation, innermost first."""
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    return [(one.file_name, one.line_num, one.function_name) for one in frames]


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Returns the jaxprs that an equation holds."""
    return list(_jaxprs([eqn.params, getattr(_operation(eqn), "params", None)]))


def ragged_dot_primitive() -> Any:
    """Returns the primitive of `jax.lax.ragged_dot`, which JAX does not export."""
    specs = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 1), (1, 1, 1))]
    sizes = jax.ShapeDtypeStruct((1,), "int32")
    (eqn,) = jax.make_jaxpr(jax.lax.ragged_dot)(*specs, sizes).eqns
    return eqn.primitive


def called_jaxpr(eqn: Any) -> Any | None:
    """Returns the jaxpr of an equation that only runs it, such as `jit`; else None."""
    name = _CALLS.get(eqn.primitive)
    return None if name is None else eqn.params[name]


def checkpoint_params(eqn: Any) -> dict[str, Any] | None:
    """Returns the params `jaxpr`, `policy` and `prevent_cse` of `jax.checkpoint`; else None."""
    if eqn.primitive is primitives.remat_p:
        return dict(eqn.params)
    operation = _operation(eqn)
    kind = type(operation)
    if kind.__name__ in _CHECKPOINT_OPERATIONS and is_of_package(kind, "jax"):
        return {"prevent_cse": True, **operation.params}
    return None


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Returns how many inputs of a scan are constants, and how many are carried."""
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # Since JAX 0.12.
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of all jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        yield from equations_inside(eqn)


def equations_inside(eqn: Any) -> Iterator[Any]:
    """Yields the equations of all jaxprs that an equation holds."""
    params = [eqn.params, getattr(_operation(eqn), "params", None)]
    for jaxpr in _jaxprs(params):
        yield from equations(jaxpr)


def constants_inside(jaxpr: Any) -> Iterator[Any]:
    """Yields the constants of all jaxprs inside a jaxpr, such as arrays that a `jit` captured."""
    for eqn in equations(jaxpr):
        for inner in _jaxprs([eqn.params, getattr(_operation(eqn), "params", None)]):
            yield from getattr(inner, "consts", ())


def contains_primitive(jaxpr: Any, primitive: Any) -> bool:
    """Whether a jaxpr, or a jaxpr inside it, has an equation of a primitive."""
    return any(eqn.primitive is primitive for eqn in equations(jaxpr))


def _operation(eqn: Any) -> Any:
    is_operation = eqn.primitive.name == _OPERATION_PRIMITIVE and is_of_package(
        type(eqn.params.get("_prim")), "jax"
    )
    return eqn.params["_prim"] if is_operation else None


@functools.cache
def print_primitive() -> Any:
    """Returns the primitive of `jax.debug.print`, which JAX does not export."""
    closed = jax.make_jaxpr(lambda x: jax.debug.print("{}", x))(0)
    (eqn,) = closed.eqns
    return eqn.primitive


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)
    elif isinstance(value, dict):
        yield from _jaxprs(tuple(value.values()))
