"""Per-example gradients of a loss: what `dpoptax.per_example_grads` does, call by call."""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax import _markers, _validate
from dpoptax._explicit_axes import by_example
from dpoptax._masked_examples import unmasked
from dpoptax._pytree import PyTree
from dpoptax.per_example import _validate_loss as validation
from dpoptax.per_example._base import PerExampleGrads, Values, select
from dpoptax.per_example._call_note import refuse_no_function
from dpoptax.per_example._choose_form import FORMS, automatic_grads, automatic_grads_of_part
from dpoptax.per_example._deferred import DeferredGrads
from dpoptax.per_example._loss_trace import LossTrace
from dpoptax.per_example._microbatched import microbatched_grads
from dpoptax.per_example._parts import refuse_uneven
from dpoptax.per_example._self_check import check_form
from dpoptax.per_example._stacked import StackedGrads

# `loss_fn(params, example)` or `loss_fn(params, example, key)`, which returns a scalar.
LossFn: TypeAlias = Callable[..., Float[Array, ""]]
# How gradients are kept, see `per_example_grads`.
Form: TypeAlias = Literal["auto", "factored", "recomputed", "stacked"]
_FORMS: dict[str, Any] = {
    "auto": automatic_grads,
    **FORMS,
}


@runtime_checkable
class GradsFn(Protocol):
    """What `per_example_grads` returns."""

    def __call__(
        self, params: PyTree, examples: PyTree, *, mask: Any = None, key: Any = None
    ) -> PerExampleGrads:
        """Returns the gradients of every example."""


@runtime_checkable
class ValueAndGradsFn(Protocol):
    """What `value_and_per_example_grads` returns."""

    def __call__(
        self, params: PyTree, examples: PyTree, *, mask: Any = None, key: Any = None
    ) -> tuple[Any, PerExampleGrads]:
        """Returns the loss and the gradients of every example."""


def _form_of(form: str) -> Any:
    if form not in _FORMS:
        raise ValueError(
            f"form must be one of {', '.join(_FORMS)}; got {_validate.described(form)}."
        )
    return _FORMS[form]


def per_example_grads(
    loss_fn: LossFn,
    *,
    form: Form = "auto",
    microbatch_size: int | None = None,
    check: bool = False,
    allow_unused: bool = False,
) -> GradsFn:
    """Returns a function that computes the gradient of every example of a batch.

    Args:
        loss_fn: `loss_fn(params, example)`, or `loss_fn(params, example, key)` if the function
            below gets a key: the scalar loss of one example, without a batch axis. It must be pure.
            It must not couple examples, as batch statistics do: such a loss has no per-example
            gradient.
        form: how gradients are kept until they are clipped and summed.
            `"factored"` keeps the inputs and the output cotangents of matrix products, convolutions
            and lookups, which give norms and sums at about the price of a plain gradient.
            Parameters with other uses are stacked. `"recomputed"` keeps only the norms, and runs
            the backward pass a second time for the sum. It takes about the memory of a plain
            gradient, also if layers are inside `jax.checkpoint` and `jax.lax.scan`, and about 1.8
            times its multiplications. `"stacked"` is the reference: `vmap` of the gradient, which
            takes `batch x params` numbers of memory. `"auto"` chooses `"recomputed"` if the loss
            uses `jax.checkpoint` around parameters, because keeping factors would undo it, and
            `"factored"` otherwise. Within a form, a cost model chooses how the norms of each
            parameter are computed. `explain` prints the choice.
        microbatch_size: process this many examples of the whole batch at a time, for a batch that
            does not fit into memory. None processes the whole batch at once, except that
            `form="auto"` takes microbatches if factors and stacked gradients would need more than
            half of the memory of all devices, and on a CPU if the activations of the batch, or the
            rows that it looks up in tables, are much larger than the cache. In microbatches,
            `squared_norms` and `weighted_sum` are a pass over the batch each, and `clip_and_sum` is
            one. The sum is the same. If several devices share the batch, the size must be a
            multiple of their number: each device processes its own examples.
        check: compare the factored form with `vmap(grad)` on two examples at every call of the
            returned function. Under `jit` the check runs once, on made-up values. It warns if the
            loss is not finite there: an example without a finite gradient contributes nothing.
        allow_unused: accept parameters that have no influence on the loss. Their gradient is zero,
            so `privatize` would add noise to them and nothing else. Pass True only if another part
            of the objective trains them.

    Returns:
        A function `(params, examples, *, mask=None, key=None) -> PerExampleGrads`, where
        `examples` is what `dpoptax.samplers.take` returns, with its mask, or a tree of arrays with
        a leading axis `(batch, ...)`. `mask` is bool `(batch,)` with True for real examples; a row
        counts if every mask says so. `key` is one typed PRNG key, which is split into one key per
        example. Each call runs the Python function `loss_fn` once, to trace it.

    Raises:
        TypeError: (from the returned function) a parameter is not floating-point, the mask is not
            boolean, or the key is an old-style key.
        ValueError: (from the returned function) the examples disagree on the batch size, the mask
            has another length, the loss is not a scalar, the model has mutable state, or
            `microbatch_size` is not positive, or does not divide evenly over the devices.
        RuntimeError: (from the returned function) `check` found a difference.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda params, example: jnp.vdot(params["w"], example)
        >>> grads = per_example_grads(loss_fn)({"w": jnp.ones(2)}, jnp.array([[3.0, 4], [0, 1]]))
        >>> grads.squared_norms()["w"]
        Array([25.,  1.], dtype=float32)
        >>> grads.weighted_sum(jnp.array([0.2, 1.0]))["w"]
        Array([0.6, 1.8], dtype=float32)
    """
    with_values = deferred_values_and_grads(
        loss_fn,
        form=form,
        microbatch_size=microbatch_size,
        check=check,
        allow_unused=allow_unused,
    )

    def grads_fn(
        params: PyTree, examples: PyTree, *, mask: Any = None, key: Any = None
    ) -> PerExampleGrads:
        _, grads = with_values(params, examples, mask=mask, key=key)
        return grads

    return grads_fn


def value_and_per_example_grads(
    loss_fn: LossFn,
    *,
    form: Form = "auto",
    microbatch_size: int | None = None,
    check: bool = False,
    allow_unused: bool = False,
    has_aux: bool = False,
) -> ValueAndGradsFn:
    """Like `per_example_grads`, but the returned function also returns the losses.

    The losses are not private: they are neither clipped nor noised.

    Args:
        loss_fn: as in `per_example_grads`.
        form: as in `per_example_grads`.
        microbatch_size: as in `per_example_grads`. The losses then take one more forward pass.
            `dpoptax.training` saves it.
        check: as in `per_example_grads`.
        allow_unused: as in `per_example_grads`.
        has_aux: `loss_fn` returns a pair `(loss, aux)`, where `aux` is a tree of arrays. As in
            `jax.value_and_grad`, the returned function then returns `((losses, aux), grads)`.
            The leaves of `aux` get a leading axis `(batch, ...)`. They are not private.

    Returns:
        A function `(params, examples, *, mask=None, key=None) -> (losses, PerExampleGrads)`.
        `losses` has shape `(batch,)` and is zero for padded rows, as is `aux`.

    Raises:
        TypeError: as in `per_example_grads`.
        ValueError: as in `per_example_grads`.
        RuntimeError: as in `per_example_grads`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, example: 0.5 * (w - example) ** 2
        >>> fn = value_and_per_example_grads(loss_fn)
        >>> losses, grads = fn(jnp.zeros(()), jnp.array([1.0, 2.0]), mask=jnp.array([True, False]))
        >>> losses, grads.stacked()
        (Array([0.5, 0. ], dtype=float32), Array([-1.,  0.], dtype=float32))
    """
    with_values = deferred_values_and_grads(
        loss_fn,
        form=form,
        microbatch_size=microbatch_size,
        check=check,
        allow_unused=allow_unused,
        has_aux=has_aux,
        losses_first=True,
    )

    def grads_fn(
        params: PyTree, examples: PyTree, *, mask: Any = None, key: Any = None
    ) -> tuple[Any, PerExampleGrads]:
        values, grads = with_values(params, examples, mask=mask, key=key)
        return values(), grads

    return grads_fn


def deferred_values_and_grads(
    loss_fn: LossFn,
    *,
    form: Form = "auto",
    microbatch_size: int | None = None,
    check: bool = False,
    allow_unused: bool = False,
    has_aux: bool = False,
    shards: int | None = None,
    losses_first: bool = False,
    usual_size: int | None = None,
) -> Callable[..., tuple[Callable[[], Any], PerExampleGrads]]:
    """As `value_and_per_example_grads`, but with a function that returns the values.

    Call it after the gradients are clipped and summed. The values of microbatches are then those of
    the same pass. `shards` is the number of devices that share the rows of a batch, if it is known.
    With `losses_first`, values are wanted at once, and a batch is not cut because this is faster.
    Most batches have padding after `usual_size` rows.
    """
    refuse_no_function(loss_fn)
    form_of: Any = _form_of(form)
    # Microbatching wraps every form: it computes that form for each microbatch.
    if microbatch_size is not None:
        size = _validate.count("microbatch_size", microbatch_size)
        of_part = automatic_grads_of_part if form == "auto" else form_of
        form_of = functools.partial(microbatched_grads, of_part, size, shards)
    elif form == "auto":
        # For losses before the sum, parts would be computed twice.
        form_of = functools.partial(
            automatic_grads, in_parts=not losses_first, usual_size=usual_size
        )

    @by_example
    def run(
        params: PyTree, examples: PyTree, *, mask: Any, key: Any
    ) -> tuple[Any, PerExampleGrads]:
        examples, carried = unmasked(examples)
        rows = validation.batch_mask(examples, mask, *carried)
        validation.check_params(params)
        examples = jax.tree.map(jnp.asarray, examples)
        # The only run of the user's function: everything below reads the trace.
        trace = validation.check_loss(
            loss_fn, params, examples, key, has_aux=has_aux, allow_unused=allow_unused
        )
        inputs = (examples,) if key is None else (examples, jax.random.split(key, len(rows)))
        if _markers.active():
            marked = _markers.per_example(trace, params, inputs, rows)
            values = Values(marked.loss, marked.aux)
            return _named(values, rows, trace), StackedGrads(marked.gradients, rows)
        if check and form != "stacked" and len(rows):
            check_form(_form_of(form), trace, params, inputs)
        values, grads = form_of(trace, params, inputs, rows)
        return (None if values is None else _named(values, rows, trace)), grads

    def grads_fn(
        params: PyTree, examples: PyTree, *, mask: Any = None, key: Any = None
    ) -> tuple[Callable[[], Any], PerExampleGrads]:
        if microbatch_size is not None:
            refuse_uneven(microbatch_size, examples)
        values, grads = run(params, examples, mask=mask, key=key)

        def values_of_pass() -> Any:
            return _values_of(grads) if values is None else values

        return values_of_pass, grads

    return grads_fn


def _values_of(grads: PerExampleGrads) -> Any:
    """Returns the values that come with a pass of a deferred form."""
    assert isinstance(grads, DeferredGrads)
    if (known := grads.readings()) is not None:
        return _named(known.values, grads.mask, grads.trace)

    @by_example
    def run(_: PyTree, mask: Array, *, grads: DeferredGrads) -> Any:
        return _named(grads.values(), mask, grads.trace)

    return run(grads.params, grads.mask, grads=grads)


def _named(values: Values, mask: Array, trace: LossTrace) -> Any:
    """Returns the losses, or `(losses, aux)` if there is `aux`; zero for padded rows."""
    # Padded rows may hold anything, NaN included.
    losses, aux = jax.tree.map(functools.partial(select, mask), tuple(values))
    treedef = trace.program.aux_treedef
    return losses if treedef is None else (losses, jax.tree.unflatten(treedef, aux))
