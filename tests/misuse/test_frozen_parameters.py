"""A parameter without influence on the loss would get noise and nothing else: it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.per_example._loss_trace import trace_loss
from dpoptax.per_example._tracing import influence
from dpoptax.training import init_state, make_train_step

stop = jax.lax.stop_gradient
PARAMS = {"a": jnp.array([0.3, -1.2]), "b": jnp.array([0.7, 1.9]), "c": jnp.array([-0.4, 2.2])}
X = jnp.array([1.5, -0.6])


@jax.custom_vjp
def only_first(a, b):
    return a * b


# A rule may transform the cotangent in a way that has no derivative itself.
only_first.defvjp(lambda a, b: (a * b, b), lambda b, g: (jnp.sign(g) * b, None))


@jax.custom_jvp
def without_tangent(a):
    return 2.0 * a


without_tangent.defjvp(lambda primals, tangents: (2.0 * primals[0], jnp.zeros_like(tangents[0])))


def in_scan(p, x):
    def body(carry, row):
        first, second = carry
        return (second * p["a"], first + stop(p["b"]) * row), None

    (first, second), _ = jax.lax.scan(body, (p["c"], x), jnp.ones((3, 2)))
    return jnp.sum(first * second)


def in_scan_only_carried(p, x):
    """The leaf reaches the loss only after it went around the loop twice."""

    def body(carry, _):
        first, second, third = carry
        return (first + second, third, third), None

    (first, *_), _ = jax.lax.scan(body, (x, x * p["b"], p["a"]), length=3)
    return jnp.sum(first)


def in_reference(p, x):
    total = jax.new_ref(jnp.zeros(2))
    total[...] += p["a"] * x * p["b"]
    return jnp.sum(total[...] * p["c"])


# name: (loss, the leaves that have no gradient)
LOSSES = {
    "all used": (lambda p, x: jnp.sum(p["a"] * p["b"] * p["c"] * x), ""),
    "unused": (lambda p, x: jnp.sum(p["a"] * x), "bc"),
    "stop_gradient": (lambda p, x: jnp.sum(p["a"] * stop(p["b"]) * x + p["c"]), "b"),
    "stopped after use": (lambda p, x: jnp.sum(stop(p["a"] * p["b"]) + p["b"] * p["c"]), "a"),
    "integers": (lambda p, x: jnp.sum(p["a"].astype(int).astype(float) * p["b"] * p["c"]), "a"),
    "comparison": (lambda p, x: jnp.sum(jnp.where(p["a"] > 0, p["b"], p["c"])), "a"),
    "rounded": (lambda p, x: jnp.sum(jnp.round(p["a"]) * jnp.sign(p["b"]) * p["c"]), "ab"),
    "straight through": (
        lambda p, x: jnp.sum(p["a"] + stop(jnp.round(p["a"]) - p["a"]) + p["b"] * p["c"]),
        "",
    ),
    "index": (lambda p, x: jnp.sum(p["b"][jnp.argmax(p["a"])] * p["c"]), "a"),
    "jit": (lambda p, x: jax.jit(lambda a, b: jnp.sum(a * stop(b)))(p["a"], p["b"]), "bc"),
    "checkpoint": (
        lambda p, x: jax.checkpoint(lambda p: jnp.sum(only_first(p["a"], p["b"]) * p["c"]))(p),
        "b",
    ),
    "custom_vjp": (lambda p, x: jnp.sum(only_first(p["a"], p["b"]) * p["c"]), "b"),
    "custom_jvp": (lambda p, x: jnp.sum(without_tangent(p["a"]) + jax.nn.silu(p["b"])), "ac"),
    "scan": (in_scan, "b"),
    "scan, only carried": (in_scan_only_carried, "c"),
    "cond": (
        lambda p, x: jax.lax.cond(
            jnp.sum(p["c"]) > 0, lambda: jnp.sum(p["a"]), lambda: jnp.sum(stop(p["b"]))
        ),
        "bc",
    ),
    "reference": (in_reference, ""),
}


def refused(loss, params=PARAMS):
    trace, _, _ = trace_loss(loss, params, (X,))
    return set(trace.program.unused_params)


@pytest.mark.parametrize(("loss", "frozen"), LOSSES.values(), ids=LOSSES)
def test_the_leaves_without_a_derivative_are_found(loss, frozen):
    assert refused(loss) == {f"['{name}']" for name in frozen}
    gradients = jax.grad(loss)(PARAMS, X)
    for name in frozen:
        np.testing.assert_array_equal(gradients[name], 0)


def test_plain_dependence_would_miss_them(monkeypatch):
    """Power: without derivatives only an unused leaf is found."""
    follow_all = influence.Influence.__init__
    monkeypatch.setattr(
        influence.Influence, "__init__", lambda self, **_: follow_all(self, by_derivative=False)
    )
    assert refused(LOSSES["unused"][0]) == {"['b']", "['c']"}
    assert refused(LOSSES["stop_gradient"][0]) == set()
    assert refused(LOSSES["custom_vjp"][0]) == set()


def test_custom_derivatives_may_close_over_arrays():
    """JAX makes such an array an input of the equation, which it does not differentiate."""
    scales = jnp.array([2.0, 3.0])

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x * scales)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, cotangent: (cotangent,))

    @jax.custom_jvp
    def doubled(x):
        return x * scales

    doubled.defjvp(lambda primals, tangents: (primals[0] * scales, 2.0 * tangents[0]))

    def loss(params, x):
        return jnp.sum(rounded(params["a"] * x) + doubled(params["b"] * x) * params["c"])

    assert refused(loss) == set()
    assert refused(lambda p, x: jnp.sum(rounded(p["a"] * x))) == {"['b']", "['c']"}
    rows = jnp.stack([X, 2 * X, -X])
    found = dpoptax.per_example_grads(loss)(PARAMS, rows).stacked()
    expected = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, rows)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, 1e-6), found, expected)


def backbone_loss(params, example):
    hidden = jnp.tanh(example @ stop(params["backbone"]))
    return jnp.sum((hidden @ params["head"]) ** 2)


MODEL = {"backbone": jnp.ones((2, 3)), "head": jnp.ones((3, 1))}
ROWS = jnp.ones((40, 2))
MESSAGE = r"influence on the loss; got params\['backbone'\] without one.*close over the frozen part"
KEYS = dpoptax.random.split_by_purpose(jax.random.key(0))


def fit(loss, params, rows=ROWS):
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=2,
        delta=1e-3,
    )  # fmt: skip
    return dpoptax.training.fit(
        loss, params, rows, plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0),
        progress=False,
    )  # fmt: skip


def test_every_entry_refuses_it_by_name():
    with pytest.raises(ValueError, match=MESSAGE):
        fit(backbone_loss, MODEL)
    for options in ({}, {"form": "stacked"}, {"microbatch_size": 2}):
        with pytest.raises(ValueError, match=MESSAGE):
            dpoptax.per_example_grads(backbone_loss, **options)(MODEL, ROWS)
    with pytest.raises(ValueError, match=r"params\[0\].*params\[4\] and 15 more without one"):
        dpoptax.per_example_grads(lambda p, x: jnp.sum(x))([jnp.ones(2)] * 20, ROWS)


def test_the_advice_of_the_error_trains_the_head_alone():
    frozen, trainable = {"backbone": MODEL["backbone"]}, {"head": MODEL["head"]}
    grads_fn = dpoptax.per_example_grads(
        lambda trainable, example: backbone_loss({**frozen, **trainable}, example)
    )
    grads = jax.eval_shape(grads_fn, trainable, ROWS)
    assert set(grads.parameter_specs()) == {"head"}


def test_a_leaf_without_numbers_needs_no_influence():
    params = {"w": jnp.ones(2), "none": jnp.ones((0, 3))}
    grads = dpoptax.per_example_grads(lambda p, x: jnp.vdot(p["w"], x))(params, ROWS)
    assert grads.parameter_specs()["none"].shape == (0, 3)


def test_another_part_of_an_objective_may_train_it():
    grads_fn = dpoptax.per_example_grads(backbone_loss, allow_unused=True)
    norms = jax.eval_shape(lambda: grads_fn(MODEL, ROWS).squared_norms())
    assert set(norms) == {"backbone", "head"}

    class WithPrior:
        """An objective whose prior alone trains the backbone."""

        def loss(self, point, example, key):
            return backbone_loss(point, example)

        def gradient_point(self, params, opt_state):
            return params

        def wrap(self, private, key):
            return private

    tx = dpoptax.dp_sgd(0.1, 1.0, noise_multiplier=1.0, expected_batch_size=8, key=KEYS.noise_key)
    run = {"tx": tx, "sampler": dpoptax.samplers.Poisson(40, 8)}
    state = init_state(MODEL, sampling_key=KEYS.sampling_key, model_key=KEYS.model_key, **run)
    jax.eval_shape(make_train_step(WithPrior(), **run), state, ROWS)
    with pytest.raises(ValueError, match=MESSAGE):
        jax.eval_shape(make_train_step(backbone_loss, **run), state, ROWS)


def test_explain_shows_it_and_does_not_refuse():
    (backbone, _) = dpoptax.explain(backbone_loss, MODEL, ROWS)
    assert backbone.form == "stacked"
    assert "stop_gradient" in backbone.rule
