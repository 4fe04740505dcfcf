"""Markers: equations that show, in the trace of a step, where private data are drawn and released.

While `dpoptax.certify` traces a step, the functions of the pipeline put one equation of their own
in place of their computation. The equation says what happened, and it has no implementation.
Outside of `certify` nothing changes.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpoptax._jax_compat import define_marker, split_constants
from dpoptax._precision import wide_dtype
from dpoptax._pytree import PyTree

SAMPLE = define_marker("dpoptax_sample")
TAKE = define_marker("dpoptax_take")
PER_EXAMPLE = define_marker("dpoptax_per_example")
RELEASE = define_marker("dpoptax_release")
BIND_KEY = define_marker("dpoptax_bind_key")

_active = contextvars.ContextVar("dpoptax_markers", default=False)


class Note:
    """What a marker says. It compares by identity, so no two markers are merged."""

    def __init__(self, **content: Any) -> None:
        self.__dict__.update(content)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Marked(NamedTuple):
    """The outputs of the marker of per-example gradients: trees with a leading batch axis."""

    loss: Any
    aux: list[Any]
    gradients: PyTree


def active() -> bool:
    """Whether `certify` is tracing."""
    return _active.get()


@contextlib.contextmanager
def certifying() -> Iterator[None]:
    """Turns the markers on."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def _paused() -> Iterator[None]:
    token = _active.set(False)
    try:
        yield
    finally:
        _active.reset(token)


def _mark(marker: Any, inputs: Sequence[Any], outputs: Sequence[Any], **content: Any) -> list[Any]:
    specs = tuple(jax.ShapeDtypeStruct(jnp.shape(one), jnp.result_type(one)) for one in outputs)
    found = marker.bind(*map(jnp.asarray, inputs), outputs=specs, note=Note(**content))
    return list(found)


def marks_batches(cls: type) -> None:
    """Makes `cls.sample`, if the class defines it, mark the batch that it draws."""
    sample = vars(cls).get("sample")
    if sample is None:
        return
    sample = getattr(sample, "__wrapped__", sample) if hasattr(sample, "marks_batches") else sample
    _point_super_at(sample, cls)

    @functools.wraps(sample)
    def marked(self: Any, state: Any) -> Any:
        if not active():
            return sample(self, state)
        # A sampler may be built on another one: the outermost is the one that counts.
        with _paused():
            closed, result = jax.make_jaxpr(lambda state: sample(self, state), return_shape=True)(
                state
            )
        jaxpr, constants = split_constants(closed)
        known = [None if isinstance(one, jax.core.Tracer) else one for one in constants]
        traced = [one for one in constants if isinstance(one, jax.core.Tracer)]
        outputs, structure = jax.tree.flatten(result)
        found = _mark(
            SAMPLE,
            [*traced, *jax.tree.leaves(state)],
            outputs,
            sampler=self,
            own_state=_has_structure_of(self, state),
            jaxpr=jaxpr,
            constants=known,
        )
        return jax.tree.unflatten(structure, found)

    marked.marks_batches = True  # type: ignore[attr-defined]
    cls.sample = marked  # type: ignore[attr-defined]


def _has_structure_of(sampler: Any, state: Any) -> bool:
    """Whether a state is of the types that `init` of a sampler makes."""
    with _paused():
        own = jax.eval_shape(sampler.init, jax.random.key(0))
    structures: list[Any] = [jax.tree.structure(one) for one in (own, state)]
    same: bool = structures[0] == structures[1]
    return same


def _point_super_at(function: Any, cls: type) -> None:
    """Lets `super()` work in a class that attrs made again, with slots, from one of that name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), cells or (), strict=False):
        try:
            held = cell.cell_contents
        except ValueError:  # the class is not made yet
            continue
        # Decorators close over other things too.
        if name != "__class__" or not isinstance(held, type):
            continue
        if (held.__module__, held.__qualname__) == (cls.__module__, cls.__qualname__):
            cell.cell_contents = cls


def taken(data: PyTree, indices: Any, mask: Any) -> tuple[PyTree, Any]:
    """Marks a gather: returns the rows of a batch, and its mask."""
    leaves, structure = jax.tree.flatten(data)
    rows = [
        jax.ShapeDtypeStruct((*jnp.shape(indices), *jnp.shape(leaf)[1:]), jnp.result_type(leaf))
        for leaf in leaves
    ]
    *rows, mask = _mark(TAKE, [indices, mask, *leaves], [*rows, mask])
    return jax.tree.unflatten(structure, rows), mask


def per_example(
    trace: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...], mask: Any
) -> Marked:
    """Marks per-example gradients.

    Args:
        trace: the traced loss, `(params, *inputs) -> (loss, aux)`.
        params: the parameters.
        inputs: examples, and keys if the loss takes them, with a leading batch axis.
        mask: bool `(batch,)`.
    """

    def one(params: PyTree, *row: PyTree) -> Any:
        (loss, aux), gradients = jax.value_and_grad(trace, has_aux=True)(params, *row)
        return Marked(loss, aux, gradients)

    row = jax.tree.map(lambda leaf: jax.eval_shape(lambda x: x[0], leaf), inputs)
    # The gradient is traced too: a custom derivative may hold what its function does not show.
    closed, result = jax.make_jaxpr(one, return_shape=True)(params, *row)
    jaxpr, constants = split_constants(closed)
    specs, structure = jax.tree.flatten(result)
    outputs = [jax.ShapeDtypeStruct((len(mask), *spec.shape), spec.dtype) for spec in specs]
    weights, rows = jax.tree.leaves(params), jax.tree.leaves(inputs)
    found = _mark(
        PER_EXAMPLE,
        [mask, *rows, *weights, *constants],
        outputs,
        jaxpr=jaxpr,
        rows=len(rows),
        weights=len(weights),
    )
    marked: Marked = jax.tree.unflatten(structure, found)
    return marked


def released(
    sum_release: Any, key: Any, grads: Any, state: Any, step: Any
) -> tuple[PyTree, PyTree, Any]:
    """Marks a release: returns the noisy sum, and what the next release needs.

    These are the next state of clip rule and mechanism, and the next step.

    Args:
        sum_release: clips, sums and adds noise.
        key: the key of the noise.
        grads: the per-example gradients.
        state: a tuple with `clip`, which is released, and `mechanism`, which is secret.
        step: the number of the release.
    """
    leaves, structure = jax.tree.flatten(grads.stacked())
    held, state_structure = jax.tree.flatten(state)
    forms = _forms_in(grads)
    masks = [one.mask for one in forms]
    sums = [jax.ShapeDtypeStruct(leaf.shape[1:], wide_dtype(leaf.dtype)) for leaf in leaves]
    found = _mark(
        RELEASE,
        [key, step, *leaves, *held, *masks],
        [*sums, step, *held],
        forms=[type(one) for one in forms],
        release=type(sum_release),
        masks=len(masks),
        settings=sum_release.settings,
        leaves=len(leaves),
        public=len(jax.tree.leaves(state.clip)),
    )
    sums, (step, *held) = found[: len(leaves)], found[len(leaves) :]
    return (
        jax.tree.unflatten(structure, sums),
        jax.tree.unflatten(state_structure, held),
        step,
    )


def _forms_in(grads: Any) -> list[Any]:
    """Returns per-example gradients, and those that they hold."""
    fields = getattr(type(grads), "__dataclass_fields__", ())
    held = [getattr(grads, name, None) for name in fields]
    inner = [_forms_in(one) for one in held if hasattr(one, "clip_and_sum")]
    return [grads, *(one for ones in inner for one in ones)]


def bound_key(key: Any, values: PyTree) -> Any:
    """Marks a noise key that is bound to values: returns the new key."""
    (bound,) = _mark(BIND_KEY, [key, *jax.tree.leaves(values)], [key])
    return bound
