"""The noise that an optimizer is told of is the noise of the release that it gets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from strategies import CORRELATED

import dpoptax
from dpoptax import transforms
from dpoptax.schedules import Schedule

# Tolerance of a standard deviation from n draws, in standard errors: 4 / sqrt(2 n).
NUM = 20_000
TOLERANCE = 4 / np.sqrt(2 * NUM)
PARAMS = {"a": jnp.zeros(NUM), "b": jnp.zeros((2, NUM // 2), jnp.bfloat16)}
ZEROS = {"a": jnp.zeros((3, NUM)), "b": jnp.zeros((3, 2, NUM // 2), jnp.bfloat16)}

# The registry's rules with groups are for other parameters.
RULES = {
    **registry.CLIP_RULES,
    **registry.CLIP_RULES_WITH_STATE,
    "group": lambda bound: dpoptax.clipping.GroupClip({"a": 0.6 * bound, "b": 0.8 * bound}),
    "per layer, by size": lambda bound: dpoptax.clipping.PerLayerClip.by_size(bound, PARAMS),
}


def probe():
    """A transformation that keeps what it is told, and what it gets."""

    def update(updates, state, params=None, *, noise_stddev=None):
        return updates, (jax.tree.broadcast(noise_stddev, updates), updates)

    # A state of the right structure is not needed: each test makes one step at a time.
    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def released(optimizer, steps=3, **arguments):
    options = {"clip": 1.0, "noise_multiplier": 1.5, "expected_batch_size": 4.0} | arguments
    private = dpoptax.privatize(key=jax.random.key(0), **options)
    tx = transforms.chain(private, optimizer)
    state, found = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        _, (private_state, seen) = update(ZEROS, (state[0], ()), PARAMS)
        state = (private_state, ())
        found.append(seen)
    return found


def check(found):
    for stddevs, release in found:
        for stddev, leaf in zip(*map(jax.tree.leaves, (stddevs, release)), strict=True):
            scaled = np.asarray(leaf, np.float32) / np.broadcast_to(stddev, leaf.shape)
            assert abs(scaled.std() - 1) < TOLERANCE


# Whole-number noise takes longest to compile. Its scale depends on the groups and state of a rule.
SLOW_WITH_DISCRETE_NOISE = RULES.keys() - {"flat", "group", "quantile"}


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("rule", "mechanism"),
    [
        pytest.param(
            rule,
            mechanism,
            marks=pytest.mark.slow
            if "discrete" in mechanism and rule in SLOW_WITH_DISCRETE_NOISE
            else (),
            id=f"{rule}-{mechanism}",
        )
        for rule in RULES
        for mechanism in registry.MECHANISMS
    ],
)
def test_it_is_known_for_every_clip_rule_and_mechanism(rule, mechanism):
    mechanism = registry.MECHANISMS[mechanism]()
    check(released(probe(), steps=3, clip=RULES[rule](2.0), mechanism=mechanism))


@pytest.mark.parametrize("mechanism", CORRELATED.values(), ids=CORRELATED)
def test_it_is_known_for_every_step_of_correlated_noise(mechanism):
    found = released(probe(), steps=5, mechanism=mechanism())
    check(found)
    stated = [float(np.ravel(stddevs["a"])[0]) for stddevs, _ in found]
    np.testing.assert_allclose(stated, mechanism().strategy.noise_norms()[:5] * 1.5 / 4, rtol=1e-5)
    assert stated[-1] > 1.05 * stated[0]


def test_it_follows_schedules_of_clip_noise_and_batch_size():
    found = released(
        probe(),
        clip=Schedule((1.0, 3.0), (1, 9)),
        noise_multiplier=Schedule((2.0, 1.0), (2, 9)),
        expected_batch_size=Schedule((4.0, 8.0), (1, 9)),
    )
    check(found)
    stated = [float(np.ravel(stddevs["a"])[0]) for stddevs, _ in found]
    np.testing.assert_allclose(stated, [0.5, 0.75, 0.375], rtol=1e-6)


def test_it_is_known_per_coordinate_where_gradients_are_scaled():
    scale = lambda params: {"a": jnp.linspace(0.5, 2.0, NUM), "b": 4.0}  # noqa: E731
    found = released(transforms.scale_then_privatize(probe(), scale=scale), steps=1)
    check(found)
    np.testing.assert_allclose(found[0][0]["a"][0], 1.5 / 4 / 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(found[0][0]["b"])[0], 1.5 / 4 / 4, rtol=1e-6)


def test_second_moments_give_the_scale_and_the_noise():
    """Coordinates that were released with large squares get more noise; the total stays."""
    private = dpoptax.privatize(1.0, 1.5, expected_batch_size=4.0, key=jax.random.key(0))
    tx = transforms.chain(private, transforms.scale_then_privatize(probe(), eps=0.5))
    state = tx.init(PARAMS)
    moments = jax.tree.map(lambda v: jnp.linspace(0, 1, v.size).reshape(v.shape) ** 2,
                           state[0].second_moment)  # fmt: skip
    state = (state[0]._replace(second_moment=moments), state[1])
    _, (_, (stddevs, release)) = jax.jit(tx.update)(ZEROS, state, PARAMS)
    check([(stddevs, release)])
    r = np.linspace(0, 1, NUM) * np.sqrt(3) + 0.5
    expected = r / np.sqrt(np.mean(r**2)) * 1.5 / 4
    np.testing.assert_allclose(stddevs["a"], expected, rtol=1e-3)
    assert np.mean(np.square(stddevs["a"])) == pytest.approx((1.5 / 4) ** 2, rel=1e-3)


def test_it_passes_through_the_divergence_of_an_objective():
    guide = dpoptax.vi.guides.MeanField(jnp.zeros(2))
    elbo = dpoptax.vi.global_elbo(guide, lambda z, x: -jnp.sum((z - x) ** 2), num_examples=9)
    params = {"loc": jnp.zeros(2), "raw_scale": jnp.zeros(2)}
    grads = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape)), params)
    private = dpoptax.privatize(1.0, 1.5, expected_batch_size=4.0, key=jax.random.key(0))
    tx = transforms.chain(elbo.wrap(private, jax.random.key(1)), probe())
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(state[1][0]["loc"], 1.5 / 4, rtol=1e-6)


def test_where_it_is_not_known_an_optimizer_that_needs_it_says_so():
    guide = dpoptax.vi.guides.MeanField(jnp.zeros(2))
    elbo = dpoptax.vi.aligned_elbo(guide, lambda z, x: -jnp.sum((z - x) ** 2), num_examples=9)
    params = {"loc": jnp.zeros(2), "raw_scale": jnp.zeros(2)}
    private = dpoptax.privatize(1.0, 1.5, expected_batch_size=4.0, key=jax.random.key(0))
    tx = transforms.chain(elbo.wrap(private, jax.random.key(1)), transforms.scale_by_adam_bc())
    state = jax.jit(tx.init)(params)
    point = jax.eval_shape(elbo.gradient_point, params, state)
    grads = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape)), point)
    with pytest.raises(ValueError, match="noise is not known"):
        jax.jit(tx.update)(grads, state, params)
    plain = optax.chain(
        dpoptax.privatize(1.0, 1.5, expected_batch_size=4.0, key=jax.random.key(2)),
        transforms.scale_by_adam_bc(),
    )
    with pytest.raises(ValueError, match=r"Use dpoptax\.transforms\.chain"):
        jax.jit(plain.update)(ZEROS, plain.init(PARAMS), PARAMS)


def test_chain_needs_privatize_first():
    with pytest.raises(ValueError, match="first argument of chain must hold privatize"):
        transforms.chain(optax.identity(), optax.sgd(1.0)).init(PARAMS)
    with pytest.raises(TypeError, match="acts before the clip needs"):
        transforms.chain(optax.identity(), transforms.disk(optax.sgd(1.0)))


@pytest.mark.seconds
@pytest.mark.parametrize(
    "make", [transforms.scale_then_privatize, transforms.disk], ids=lambda make: make.__name__
)
def test_an_optimizer_that_acts_before_the_clip_must_be_outermost(make):
    private = dpoptax.privatize(1.0, 1.5, expected_batch_size=4.0, key=jax.random.key(0))
    tx = optax.chain(private, make(optax.sgd(1.0)))
    with pytest.raises(ValueError, match=rf"{make.__name__} acts before the clip, so it must be"):
        tx.update(ZEROS, tx.init(PARAMS), PARAMS)
