"""Where a rule says that rows stay apart, changing one row changes no other row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit.leaking_programs import DATASET, WIDTH, apply, gradients, initial, sample

import dpoptax
from dpoptax import _jax_compat
from dpoptax.audit import _row_rules
from dpoptax.samplers import MaskedExamples

ROWS = 5
X = np.random.default_rng(1).normal(size=(ROWS, 4, 3)).astype(np.float32)
PUBLIC = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
TABLE = np.random.default_rng(3).normal(size=(7, 2)).astype(np.float32)
IDS = np.random.default_rng(4).integers(0, 7, (ROWS, 4)).astype(np.int32)

# Functions of one primitive, the axis of the examples in their input, and whether rows stay apart.
CASES = {
    "tanh": (jnp.tanh, X, True),
    "add a public array": (lambda x: jax.lax.add(x, jnp.broadcast_to(PUBLIC, X.shape)), X, True),
    "add an axis of size one": (lambda x: x[:, :1] + x, X, True),
    "select": (lambda x: jnp.where(x > 0, x, -x), X, True),
    "clamp": (lambda x: jax.lax.clamp(0.0, x, 1.0), X, True),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, None], (ROWS, 2, 4, 3)), X, True),
    "broadcast to the front": (lambda x: jnp.broadcast_to(x, (2, *X.shape)), X, True),
    "reshape": (lambda x: x.reshape(ROWS, 12), X, True),
    "reshape to the front": (lambda x: x.reshape(1, ROWS, 2, 6), X, True),
    "reshape across rows": (lambda x: x.reshape(12, ROWS), X, False),
    "reshape to pairs": (lambda x: x.reshape(ROWS * 4, 3), X, False),
    "transpose": (lambda x: x.transpose(2, 0, 1), X, True),
    "squeeze": (lambda x: jax.lax.squeeze(x[:, :1], (1,)), X, True),
    "slice": (lambda x: jax.lax.slice(x, (0, 1, 0), (ROWS, 4, 2)), X, True),
    "slice rows": (lambda x: x[1:3], X, False),
    "dynamic slice": (lambda x: jax.lax.dynamic_slice(x, (0, 1, 0), (ROWS, 2, 3)), X, True),
    "dynamic slice of rows": (lambda x: jax.lax.dynamic_slice(x, (1, 1, 0), (2, 2, 3)), X, False),
    "sum": (lambda x: jnp.sum(x, axis=(0, 2)), X, False),
    "sum within": (lambda x: jnp.sum(x, axis=(1, 2)), X, True),
    "maximum": (lambda x: jnp.max(x, axis=1), X, True),
    "argmax": (lambda x: jnp.argmax(x, axis=2), X, True),
    "argmax of rows": (lambda x: jnp.argmax(x, axis=0), X, False),
    "cumulative sum": (lambda x: jnp.cumsum(x, axis=2), X, True),
    "cumulative sum of rows": (lambda x: jnp.cumsum(x, axis=0), X, False),
    "sort": (lambda x: jnp.sort(x, axis=1), X, True),
    "sort rows": (lambda x: jnp.sort(x, axis=0), X, False),
    "top k": (lambda x: jax.lax.top_k(x, 2)[0], X, True),
    "top k of rows": (lambda x: jax.lax.top_k(x.T, 2)[0], X, False),
    "reverse": (lambda x: x[:, ::-1], X, True),
    "reverse rows": (lambda x: x[::-1], X, False),
    "concatenate": (lambda x: jnp.concatenate([x, x], axis=1), X, True),
    "concatenate rows": (lambda x: jnp.concatenate([x, x], axis=0), X, False),
    "stack": (lambda x: jnp.stack([x, 2 * x]), X, True),
    "stack in the middle": (lambda x: jnp.stack([x, 2 * x], axis=2), X, True),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 2))), X, True),
    "pad rows": (lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0))), X, False),
    "split": (lambda x: jnp.split(x, 2, axis=1)[1], X, True),
    "product with a matrix": (lambda x: x @ PUBLIC.T, X, True),
    "matrix on the left": (lambda x: jnp.einsum("ab,nbc->anc", PUBLIC.T, x), X, True),
    "product of rows": (lambda x: jnp.einsum("nab,nac->nbc", x, x), X, True),
    "product across rows": (lambda x: jnp.einsum("nab,mab->nm", x, x), X, False),
    "product over rows": (lambda x: jnp.einsum("nab,n->ab", x, jnp.ones(ROWS)), X, False),
    "convolution": (
        lambda x: jax.lax.conv(x[:, None], jnp.ones((2, 1, 2, 2)), (1, 1), "SAME"),
        X,
        True,
    ),
    "convolution over rows": (
        lambda x: jax.lax.conv(
            x.transpose(1, 0, 2)[:, None], jnp.ones((2, 1, 2, 2)), (1, 1), "SAME"
        ),
        X,
        False,
    ),
    "lookup": (lambda ids: jnp.asarray(TABLE)[ids], IDS, True),
    "lookup by a part": (lambda ids: jnp.asarray(TABLE)[ids[:, 0]], IDS, True),
    "columns": (lambda x: x[:, jnp.array([2, 0])], X, True),
    "rows by a list": (lambda x: x[jnp.array([2, 0])], X, False),
    "one of each row": (
        lambda x: jnp.take_along_axis(x, jnp.zeros((ROWS, 1, 3), jnp.int32), axis=1),
        X,
        True,
    ),
    "vmap of a lookup": (
        lambda ids: jax.vmap(lambda row: jnp.asarray(TABLE)[row[1]])(ids),
        IDS,
        True,
    ),
    "vmap of an index": (lambda x: jax.vmap(lambda row: row[jnp.int32(2)])(x), X, True),
}


def axis_of_the_examples(function, x):
    """The axis that the rules find in the output; None if rows may meet."""
    jaxpr, constants = _jax_compat.split_constants(jax.make_jaxpr(function)(x))
    variables, _ = _jax_compat.inputs_of(jaxpr)
    known = dict.fromkeys(variables[: len(constants)]) | {variables[-1]: 0}

    def follow(jaxpr, known):
        for eqn in jaxpr.eqns:
            axes = [None if _jax_compat.is_literal(one) else known[one] for one in eqn.invars]
            if (inner := _jax_compat.called_jaxpr(eqn)) is not None:
                names, held = _jax_compat.inputs_of(inner)
                found = follow(inner, dict(zip(names, [*[None] * len(held), *axes], strict=True)))
            elif any(axis is not None for axis in axes):
                found = _row_rules.axes_of_outputs(eqn, axes)
                if found is None:
                    raise LookupError(eqn.primitive.name)
            else:
                found = [None] * len(eqn.outvars)
            known.update(zip(eqn.outvars, found, strict=True))
        return [None if _jax_compat.is_literal(one) else known[one] for one in jaxpr.outvars]

    try:
        return follow(jaxpr, known)[0]
    except LookupError:
        return None


@pytest.mark.parametrize("name", CASES)
def test_rows_stay_apart_where_a_rule_says_so(name):
    function, x, apart = CASES[name]
    axis = axis_of_the_examples(function, x)
    assert (axis is not None) == apart
    if axis is None:
        return
    changed = x.copy()
    changed[2] = 5 if x.dtype == np.int32 else 2.5
    before, after = (np.moveaxis(np.asarray(function(one)), axis, 0) for one in (x, changed))
    assert before.shape[0] == ROWS
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(before[others], after[others])
    assert not np.array_equal(before[2], after[2])


# Random programs from parts that treat each row alone, and from parts that do not.

SAFE = {
    "scale": lambda x: 0.5 * x + 1.0,
    "tanh": jnp.tanh,
    "sort": lambda x: jnp.sort(x, axis=1),
    "normalise": lambda x: x / (1.0 + jnp.sum(x**2, axis=1, keepdims=True)),
    "matrix": lambda x: x @ (jnp.ones((WIDTH, WIDTH)) + jnp.eye(WIDTH)),
    "vmap": jax.vmap(lambda row: row * jnp.max(row)),
    "map": lambda x: jax.lax.map(lambda row: jnp.cumsum(row), x),
    "jit": jax.jit(lambda x: jnp.where(x > 0, x, jnp.flip(x, axis=1))),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(x)),
    "columns": lambda x: jnp.concatenate([x[:, 1:], x[:, :1]], axis=1),
    "scan": lambda x: jax.lax.scan(lambda c, _: (jnp.cos(c), None), x, None, length=2)[0],
    "cond": lambda x: jax.lax.cond(jnp.array(True), jnp.tanh, lambda y: y, x),
    "transpose": lambda x: jnp.tanh(x.T).T,
}
LEAKING = {
    "mean": lambda x: x - jnp.mean(x, axis=0),
    "roll": lambda x: x + jnp.roll(x, 1, axis=0),
    "cumulate": lambda x: jnp.cumsum(x, axis=0),
    "sort": lambda x: jnp.sort(x, axis=0),
    "mix": lambda x: jnp.ones((len(x), len(x))) @ x,
    "total": lambda x: x * jnp.sum(x),
    "carry": lambda x: jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(WIDTH), x)[1],
    "permute": lambda x: x[jnp.arange(len(x))[::-1]],
    "decide": lambda x: jax.lax.cond(jnp.sum(x) > 0, jnp.tanh, lambda y: y, x),
    "covariance": lambda x: x @ (x.T @ x),
    "repeat": lambda x: jnp.broadcast_to(x[:1], x.shape),
    "maximum": lambda x: jnp.maximum(x, jnp.max(x)),
}


def program(parts, before):
    """A step whose rows go through parts, before the loss or after the gradient."""

    def change(x):
        for part in parts:
            x = part(x)
        return x

    def step(s, data):
        s, _, taken = sample(s, data)
        x, y = taken.examples["x"], taken.examples["y"]
        if before:
            changed = MaskedExamples({"x": change(x), "y": y}, taken.mask)
            return apply(s, gradients(s.params, changed))
        grads = gradients(s.params, taken).stacked()
        masked = jnp.where(taken.mask[:, None], change(grads["w"]), 0.0)
        return apply(s, {"w": masked})

    return step


@pytest.mark.parametrize("seed", range(len(LEAKING)))
def test_one_leak_among_random_safe_parts_is_found(seed):
    rng = np.random.default_rng(seed)
    parts = [SAFE[name] for name in rng.choice(list(SAFE), 4)]
    before = bool(rng.integers(2))
    safe = dpoptax.certify(program(parts, before), initial(), DATASET, private="data")
    assert safe.certified, str(safe)
    parts[rng.integers(4)] = list(LEAKING.values())[seed]
    leaking = dpoptax.certify(program(parts, before), initial(), DATASET, private="data")
    assert not leaking.certified
