"""The page on extending: its code runs, and each extension works after one registry line."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax.per_example import _primitives
from dpoptax.per_example._norm_rules import select

# Who works on something else sees a fault of this page before the merge.
pytestmark = pytest.mark.slow

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page():
    """The names that the code of the page defines."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def registered(page, monkeypatch):
    """The primitive and the norm rule of the page are in their tables."""
    monkeypatch.setitem(_primitives._TABLE, page["DIV"].primitive, page["DIV"])
    monkeypatch.setattr(select, "RULES", (page["VectorOverData"], *select.RULES))


def test_a_sampler_trains_and_is_accounted(page):
    sampler = page["FullBatch"](50)
    plan = dpoptax.Plan(sampler=sampler, clip=1.0, noise_multiplier=2.0, num_steps=4, delta=1e-5)
    result = dpoptax.training.fit(
        lambda mean, x: jnp.sum((mean - x) ** 2),
        jnp.zeros(3),
        jnp.ones((50, 3)),
        plan=plan,
        optimizer=optax.sgd(0.1),
        progress=False,
    )
    assert result.num_steps == 4
    # Four Gaussian releases of multiplier 2 are one of multiplier 1.
    assert abs(result.epsilon() - 4.3766) < 0.01


def test_a_clip_rule_keeps_its_sensitivity(page):
    rule, params = page["SmoothClip"](0.7), {"w": jnp.zeros(3)}
    for size in np.geomspace(1e-6, 1e12, 40):
        grads = {"w": jnp.full((1, 3), size / np.sqrt(3), jnp.float32)}
        tx = dpoptax.privatize(rule, 0.0, expected_batch_size=1, key=jax.random.key(0))
        update, _ = tx.update(grads, tx.init(params), params)
        assert registry.global_norm(update) <= 0.7 * (1 + 1e-5)
    tx = dpoptax.privatize(rule, 1.0, expected_batch_size=1, key=jax.random.key(0))
    update, _ = tx.update({"w": jnp.full((1, 3), jnp.nan)}, tx.init(params), params)
    assert bool(jnp.isfinite(update["w"]).all())


@pytest.mark.slow
def test_a_mechanism_adds_the_noise_that_it_states(page):
    mechanism = page["Generous"](factor=3.0)
    n = 40_000
    tx = dpoptax.privatize(
        2.0, 1.5, expected_batch_size=1, key=jax.random.key(0), mechanism=mechanism
    )
    update, _ = tx.update(jnp.zeros((1, n)), tx.init(jnp.zeros(n)), jnp.zeros(n))
    # The standard deviation of n draws has a relative error of 1 / sqrt(2 n).
    assert abs(float(jnp.std(update)) / 9 - 1) < 5 / np.sqrt(2 * n)


def test_a_mechanism_with_state_adds_the_noise_that_it_states(page):
    mechanism, n = page["Drifting"](), 20_000
    assert isinstance(mechanism, dpoptax.mechanisms.StatefulMechanism)
    tx = dpoptax.privatize(
        2.0, 1.5, expected_batch_size=1, key=jax.random.key(0), mechanism=mechanism
    )
    state, rows, update = tx.init(jnp.zeros(n)), [], jax.jit(tx.update)
    for scale in mechanism.noise_scales()[:3]:
        release, state = update(jnp.zeros((1, n)), state, jnp.zeros(n))
        rows.append(np.asarray(release) / (3 * scale))
    np.testing.assert_allclose(np.std(rows, axis=1), 1, atol=5 / np.sqrt(2 * n))
    # The drift has half of the noise of a step, and half of it is left in the next.
    assert abs(np.corrcoef(rows[:2])[0, 1] - 0.5 / np.sqrt(2 * 2.25)) < 5 / np.sqrt(n)


def test_a_guide_has_the_density_of_its_draws(page):
    guide = page["Isotropic"]({"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}, initial_scale=0.7)
    params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
    draws = jax.vmap(lambda key: guide.apply({"params": params}, key))(
        jax.random.split(jax.random.key(1), 20_000)
    )
    assert abs(float(draws["a"][:, 1].mean()) + 1) < 5 * 0.7 / np.sqrt(20_000)
    latents = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    found = float(guide.apply({"params": params}, latents, method="log_prob"))
    exact = -5.25 / (2 * 0.49) - 3 * np.log(0.7) - 1.5 * np.log(2 * np.pi)
    assert abs(found - exact) < 1e-4


class Divided(nn.Module):
    """A vector over data at several positions, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (8,))
        return jnp.sin(nn.Dense(2)(scale / x)).sum()


def exact_and_factored(loss_fn, params, batch):
    exact = dpoptax.per_example_grads(loss_fn, form="stacked")(params, batch)
    return exact, dpoptax.per_example_grads(loss_fn)(params, batch)


def test_a_primitive_and_a_norm_rule_give_the_gradients_of_vmap_grad(registered):
    model = Divided()
    batch = jax.random.normal(jax.random.key(1), (6, 5, 8))
    params = model.init(jax.random.key(0), batch[0])["params"]

    def loss_fn(params, x):
        return jnp.square(model.apply({"params": params}, x))

    shown = str(dpoptax.explain(loss_fn, params, batch))
    assert "vector over data" in shown
    exact, found = exact_and_factored(loss_fn, params, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        exact.squared_norms(),
        found.squared_norms(),
    )
    weights = jnp.linspace(0.0, 1.0, 6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
        exact.weighted_sum(weights),
        found.weighted_sum(weights),
    )


def test_the_norm_rule_matches_nothing_else(registered):
    """A matrix, a scalar and a vector along another axis take the general rule."""
    batch = jax.random.normal(jax.random.key(1), (6, 5, 8))
    params = {"matrix": jnp.ones((5, 8)), "scalar": jnp.ones(()), "first": jnp.ones(5)}

    def loss_fn(params, x):
        y = params["matrix"] / x + params["scalar"] / x + params["first"][:, None] / x
        return jnp.sum(jnp.sin(y))

    assert "vector over data" not in str(dpoptax.explain(loss_fn, params, batch))
    exact, found = exact_and_factored(loss_fn, params, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        exact.squared_norms(),
        found.squared_norms(),
    )
