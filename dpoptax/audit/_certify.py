"""Certify a step: private data may reach what it returns only through clip, sum and noise."""

import functools
import gc
import hashlib
import re
import weakref
from collections.abc import Callable
from typing import Any

import jax

from dpoptax import _markers, _validate
from dpoptax._jax_compat import own_trace_cache
from dpoptax._plan import Plan
from dpoptax.audit._certificate import Certificate, Leak, release_of
from dpoptax.audit._data_flow import Flow
from dpoptax.audit._freshness import repeated, states_of
from dpoptax.audit._inputs import Inputs, constant_label, is_nonprivate, read_inputs
from dpoptax.audit._labels import Label, Reason
from dpoptax.audit._marker_rules import INDEPENDENT, marker_rules
from dpoptax.audit._records import Event
from dpoptax.audit._slots import alike_outputs, moved

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def certify(
    step: Callable[..., Any], *args: Any, private: Any, plan: Plan | None = None
) -> Certificate:
    """Follows private data through a step, to everything that it returns.

    The step is traced and not run. Its trace shows where a batch is drawn and gathered, where
    per-example gradients are taken, and where a sum is clipped and gets noise. What the step
    returns may depend on private data through such a release only. Leaves whose name starts with
    `nonprivate_` are listed and may depend on them in any way.

    Each row of a gradient that is released must depend on one example only. Rows of the data may be
    changed before, by operations that treat each row alone. Two releases must not share noise, also
    in two iterations of a loop, and the state that carries the noise on must be returned.
    Callbacks, effects, custom calls and primitives that are not known here are refused.

    The certificate trusts the code of dpoptax for the clip, the sum and the noise, the law of the
    sampler, and clip rules, mechanisms and samplers of your own, which it names. It says nothing
    about numbers that were computed from the data before the step, about rounding, or about other
    code that sees the data. It holds for this program with these shapes.

    Args:
        step: a pure function, jitted or not, such as that of
            `dpoptax.training.make_train_step`, or the body of a loop of your own. It draws the
            batch with a sampler, and gathers it by `dpoptax.samplers.take`.
        args: its arguments, arrays or their shapes. With arrays, equal keys are found, and data
            that the step captured.
        private: which of them are the private data, by name or position; several in a tuple. Or the
            private arrays that `step` captured.
        plan: the plan of the run. Every release must then be a step of it, and the certificate
            states its epsilon.

    Returns:
        A `Certificate`. Read `certified` and `leaks`, or print it.

    Raises:
        ValueError: `private` is no argument, or has not one row per example; `plan` is of another
            class. Also what the step raises when it is traced.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> sampler = dpoptax.samplers.Poisson(100, 10)
        >>> key = jax.random.key(0)
        >>> tx = dpoptax.dp_sgd(0.1, 1.0, noise_multiplier=1.1, expected_batch_size=10, key=key)
        >>> grads_fn = dpoptax.per_example_grads(lambda w, x: (w - x) ** 2)
        >>> def step(params, opt_state, sampler_state, data):
        ...     sampler_state, batch = sampler.sample(sampler_state)
        ...     grads = grads_fn(params, dpoptax.samplers.take(data, batch))
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state, sampler_state
        >>> params, data = jnp.array(0.0), jnp.ones(100)
        >>> state = tx.init(params), sampler.init(jax.random.key(1))
        >>> certify(step, params, *state, data, private="data").certified
        True
        >>> def leaking(params, opt_state, sampler_state, data):
        ...     params, *state = step(params, opt_state, sampler_state, data)
        ...     return params + 1e-3 * jnp.mean(data), *state
        >>> leaks = certify(leaking, params, *state, data, private="data").leaks
        >>> leaks[0].output, leaks[0].what
        ('output[0]', '`reduce_sum` combines private values of several examples')
    """
    if plan is not None and type(plan) is not Plan:
        raise ValueError(
            f"plan must be a dpoptax.Plan; got a {type(plan).__name__}, which may compute another "
            "epsilon. Pass dpoptax.Plan(...), or plan=None."
        )
    inputs = read_inputs(step, args, private)
    (jaxpr, shapes), kept = _trace(step, inputs)
    flow = Flow(functools.partial(constant_label, inputs), marker_rules(inputs.num_examples))
    flow.kept = frozenset(inputs.kept)
    labels = flow.run(jaxpr, inputs.labels)
    returned = [path for label in labels for path in label.paths]
    flow.records.refuse_bound([(path[:1], path) for path in returned], flow.records.draws)
    flow.records.end()
    for reason in flow.records.discarded(INDEPENDENT):
        flow.records.refuse(reason)
    if flow.chooses_batches(flow.released_draws):
        what = "gradients depend on the random numbers that choose the batch"
        flow.records.refuse(Reason(what, ""))
    paths = [f"output{jax.tree_util.keystr(path)}" for path, _ in _leaves(shapes)]
    unprotected = {
        name for name, (path, _) in zip(paths, _leaves(shapes), strict=True) if is_nonprivate(path)
    }
    leaks = [*kept, *(Leak("", one.what, one.where) for one in flow.records.refusals)]
    found: dict[str, list[str]] = {"released": [], "secret": [], "nonprivate": []}
    for path, spec, label in zip(paths, jax.tree.leaves(shapes), labels, strict=True):
        kind, problem = _kind_of(flow, path in unprotected, _validate.is_key(spec), label)
        found.setdefault(kind, []).append(path)
        if problem is not None:
            leaks.append(Leak(path, problem.what, problem.where))
    states = states_of(jax.tree.unflatten(jax.tree.structure(shapes), labels))
    outputs = dict(zip(paths, labels, strict=True))
    alike = alike_outputs(inputs.specs, shapes)
    freshness, assumptions = repeated(flow.records, outputs, inputs, states, alike)
    leaks += moved(inputs.slots, shapes, labels, paths, alike)
    releases = [event for event in flow.records.events if event.kind == "release"]
    made = tuple(release_of(event, flow.samplers.get(event.batch)) for event in releases)
    return Certificate(
        leaks=(*leaks, *freshness, *_against_plan(made, releases, plan)),
        releases=made,
        released=tuple(found["released"]),
        secret=tuple(found["secret"]),
        nonprivate=tuple(found["nonprivate"]),
        assumptions=tuple(dict.fromkeys(assumptions)),
        program=_digest(jaxpr),
        generators=_generators(inputs, labels, shapes),
        plan=plan,
    )


def _trace(step: Callable[..., Any], inputs: Inputs) -> tuple[Any, list[Leak]]:
    """Returns the jaxpr of a step with the shapes of its outputs, and whether it keeps data."""
    private: list[Any] = []

    def traced(*args: Any) -> Any:
        leaves = zip(jax.tree.leaves(args), inputs.labels, strict=True)
        private.extend(weakref.ref(leaf) for leaf, label in leaves if not label.is_clean)
        return step(*args)

    with _markers.certifying(), own_trace_cache():
        try:
            found = jax.make_jaxpr(traced, return_shape=True)(*inputs.specs)
        except NotImplementedError as error:
            if "dpoptax_" not in str(error):
                raise
            raise ValueError(
                "expected a step that samples, gathers and releases outside of jax.vmap, jax.grad "
                "and functions mapped over devices; got one inside. Certify the step of one run."
            ) from error
    # What is computed from an argument holds it. In a list of losses it outlives the trace.
    if any(leaf() is not None for leaf in private):
        gc.collect()
    what = "a private value is kept outside of the step, or by the rule of a derivative"
    kept = any(leaf() is not None for leaf in private)
    return found, [Leak("", what, "")] if kept else []


def _leaves(tree: Any) -> Any:
    return jax.tree_util.tree_leaves_with_path(tree)


def _kind_of(
    flow: Flow, is_nonprivate: bool, is_key: bool, label: Label
) -> tuple[str, Reason | None]:
    """Returns what an output is, and why it must not be returned."""
    if not label.is_clean:
        if is_nonprivate:
            return "nonprivate", None
        unknown = Reason("it holds rows of the private data, or the members of a batch", "")
        return "leak", label.reason or unknown
    if is_key or label.declared:
        return "secret", None
    if label.paths:
        return "leak", Reason("it holds the words of a key", "")
    if label.draws & flow.kept:
        return "leak", Reason("it depends on noise that the mechanism keeps", "")
    if flow.chooses_batches(label.draws):
        if is_nonprivate:
            return "nonprivate", None
        return "leak", Reason("it depends on the random numbers that choose the batch", "")
    return ("released" if label.released else "public"), None


def _against_plan(made: tuple[Any, ...], events: list[Event], plan: Plan | None) -> list[Leak]:
    """Returns where a release is not a step of the plan."""
    if plan is None:
        return []
    expected = {
        "sampler": plan.sampler,
        "clip": plan.clip,
        "noise_multiplier": plan.noise_multiplier,
        "expected_batch_size": plan.sampler.expected_batch_size,
        "mechanism": plan.mechanism,
    }
    return [
        Leak("", f"the {name} of a release is not that of the plan", event.where)
        for release, event in zip(made, events, strict=True)
        for name, value in expected.items()
        if not _is_same(getattr(release, name), value)
    ]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two settings are equal; a class of the user's own may say that it equals anything."""
    are_numbers = all(isinstance(value, int | float) for value in (one, other))
    return (are_numbers or type(one) is type(other)) and one == other


def _digest(jaxpr: Any) -> str:
    """Returns a digest of the trace. Captured arrays are left out: they may be private."""
    return hashlib.sha256(_ADDRESS.sub("", str(jaxpr)).encode()).hexdigest()


def _generators(inputs: Inputs, labels: list[Label], shapes: Any) -> tuple[str, ...]:
    del labels
    keys = [*jax.tree.leaves(inputs.specs), *jax.tree.leaves(shapes)]
    return tuple(sorted({str(leaf.dtype) for leaf in keys if _validate.is_key(leaf)}))
