"""Mechanisms: the bound on integer contributions, the scale of the noise, and its cost."""

import fractions
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
import scipy.stats

import dpoptax
from dpoptax import mechanisms
from dpoptax.mechanisms import _discrete_gaussian as module
from dpoptax.mechanisms._discrete_gaussian import _squared_bound, _sums_of_squares
from dpoptax.per_example._stacked import StackedGrads


def transformation(mechanism, noise_multiplier=1.0, l2_clip=1.0, size=1.0, seed=0):
    key = jax.random.key(seed)
    return dpoptax.privatize(
        l2_clip, noise_multiplier, expected_batch_size=size, key=key, mechanism=mechanism
    )


def release(grads, *args, **options):
    tx = transformation(*args, **options)
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), grads)
    params = jax.tree.map(lambda leaf: leaf[0], params)
    return jax.jit(lambda grads: tx.update(grads, tx.init(params), params)[0])(grads)


MECHANISMS = {
    "one normal": mechanisms.Gaussian(),
    "four normals": mechanisms.Gaussian(num_draws=4),
    "exact": mechanisms.DiscreteGaussian(),
    "exact, coarse": mechanisms.DiscreteGaussian(bits=10),
}


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS.values(), ids=MECHANISMS)
@pytest.mark.parametrize("noise_multiplier", [0.5, 2.0])
def test_noise_has_the_stated_scale_and_the_sum_is_below_it(mechanism, noise_multiplier):
    n, l2_clip = 20_000, 3.0
    grads = jnp.concatenate([jnp.full((1, n), 100.0), jnp.zeros((1, n))])
    noisy = release(grads, mechanism, noise_multiplier, l2_clip, size=7.0)
    z = (7 * np.asarray(noisy, float) - l2_clip / math.sqrt(n)) / (noise_multiplier * l2_clip)
    # Rounding takes sqrt(n) / 2 of B grid steps from the clip: at most an eighth of it here.
    assert abs(z.mean()) < 4.5 / math.sqrt(n) + 0.125 / (noise_multiplier * math.sqrt(n))
    assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-4


@pytest.fixture
def _silent(monkeypatch):
    """Removes the noise of the discrete Gaussian mechanism, so that sums can be checked."""

    def nothing(key, shape, *, bits):
        del key, bits
        return jnp.zeros(shape, jnp.int32)

    monkeypatch.setattr(module, "discrete_gaussian", nothing)


@pytest.mark.slow
@pytest.mark.usefixtures("_silent")
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("bits", [10, 16])
@pytest.mark.parametrize("kind", ["normal", "equal", "one", "huge", "half steps"])
def test_a_contribution_is_an_integer_vector_within_the_bound(kind, bits, noise_multiplier):
    """Checked in exact arithmetic. It also comes close to the bound, so little is wasted."""
    n = 5000
    bound = (4**bits - 9) / fractions.Fraction(noise_multiplier) ** 2
    gradient = {
        "normal": np.random.default_rng(0).normal(size=n),
        "equal": np.ones(n),
        "one": np.eye(1, n)[0] * 5,
        "huge": np.random.default_rng(1).normal(size=n) * 1e15,
        # Every coordinate lies halfway between two grid steps, where rounding adds most.
        "half steps": np.full(n, 0.5) / math.sqrt(float(bound)),
    }[kind]
    grads = jnp.asarray(gradient[None], jnp.float32)
    noisy = release(grads, mechanisms.DiscreteGaussian(bits=bits), noise_multiplier)
    steps = np.asarray(noisy, float) * math.sqrt(_squared_bound(bits, noise_multiplier))
    whole = np.rint(steps).astype(int)
    assert np.abs(steps - whole).max() < 1e-2
    squared = sum(int(w) ** 2 for w in whole)
    assert squared <= bound
    expected = min(np.linalg.norm(gradient), 1) * math.sqrt(bound)
    assert math.sqrt(squared) > expected - 1.01 * math.sqrt(n)


@pytest.mark.slow
@pytest.mark.usefixtures("_silent")
def test_a_contribution_beyond_the_bound_adds_nothing():
    """Norms that are reported a thousand times too small are caught by the integer sum."""

    class Lying(StackedGrads):
        def squared_norms(self):
            return jax.tree.map(lambda norm: 1e-6 * norm, super().squared_norms())

    grads = jnp.array([[300.0, 0.4], [0.0, 0.5], [1.5, 0.0]])
    kept = mechanisms.DiscreteGaussian().release(
        jax.random.key(0), Lying(grads, jnp.ones(3, bool)), dpoptax.clipping.FlatClip(1.0), 1.0, 0
    )
    np.testing.assert_allclose(kept, [0.0, 0.5], atol=1e-3)


def test_sums_of_squares_round_down_by_no_more_than_the_allowance():
    rng = np.random.default_rng(0)
    leaves = [
        rng.integers(-(2**15), 2**15, (3, size)).astype(np.float32)
        for size in (1, 7, 100_003, 0, 64)
    ]
    sums = np.asarray(jax.jit(_sums_of_squares)([jnp.asarray(leaf) for leaf in leaves]))
    for row, found in enumerate(sums):
        truth = sum(int(v) ** 2 for leaf in leaves for v in leaf[row].tolist())
        assert fractions.Fraction(float(found)) >= truth * (1 - module.SHORTFALL)
        assert abs(float(found) - truth) < 1e-5 * truth


def divergence(bits, shift, epsilon):
    """The hockey-stick divergence between the discrete Gaussian and its shift by `shift`."""
    reach = np.arange(-12 * 2**bits, 12 * 2**bits + 1)
    grids = np.meshgrid(*[reach] * len(shift), indexing="ij")
    here = sum(-(grid.astype(float) ** 2) for grid in grids) / (2 * 4**bits)
    there = sum(
        -((grid - move).astype(float) ** 2) for grid, move in zip(grids, shift, strict=True)
    ) / (2 * 4**bits)
    total = np.exp(here).sum()
    return np.maximum(np.exp(there) - np.exp(epsilon + here), 0).sum() / total


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 2.0])
def test_the_discrete_gaussian_is_no_less_private_than_what_is_accounted(noise_multiplier):
    """All integer vectors on the bound, in one and two dimensions, against Phi exactly."""
    bits = 4
    bound = math.floor(_squared_bound(bits, noise_multiplier))
    edge = math.isqrt(bound)
    shifts = [(edge,)] + [(a, math.isqrt(bound - a * a)) for a in range(0, edge + 1, 3)]
    for shift, epsilon in itertools.product(shifts, (0.0, 0.5, 2.0)):
        mu = 1 / noise_multiplier
        norm = scipy.stats.norm
        accounted = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
            -mu / 2 - epsilon / mu
        )
        assert divergence(bits, shift, epsilon) <= accounted


def test_without_the_margin_of_the_proof_a_coarse_grid_is_less_private():
    """Noise of one grid step with a bound of one is worse than a Gaussian of multiplier one."""
    mu = 1.0
    found = [divergence(0, (1,), epsilon) for epsilon in (0.0, 0.5)]
    accounted = [
        scipy.stats.norm.cdf(mu / 2 - epsilon / mu)
        - math.exp(epsilon) * scipy.stats.norm.cdf(-mu / 2 - epsilon / mu)
        for epsilon in (0.0, 0.5)
    ]
    assert any(f > a for f, a in zip(found, accounted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS.values(), ids=MECHANISMS)
def test_every_gradient_form_gives_the_same_release(mechanism):
    params, batch = registry.params(), registry.examples(10)
    tx = transformation(mechanism)

    @jax.jit
    def run(grads, state):
        return tx.update(grads, state, params)[0]

    state = tx.init(params)
    mask = jnp.arange(10) < 8
    forms = registry.FORMS.values()
    found = [run(form(registry.loss)(params, batch, mask=mask), state) for form in forms]
    for other in found[1:]:
        # A coordinate that lies between two grid steps may go to either.
        assert registry.distance(found[0], other) < 8 / 2**10


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS.values(), ids=MECHANISMS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
def test_padding_and_non_finite_examples_add_nothing(mechanism, poison):
    grads = jnp.stack([jnp.full(5, 0.1), jnp.full(5, poison), jnp.full(5, 0.2)])
    clean = grads.at[1].set(0.0)
    np.testing.assert_array_equal(release(grads, mechanism), release(clean, mechanism))


def test_schedules_of_clip_and_noise_set_the_grid_of_their_step():
    noise = dpoptax.schedules.Schedule((1.0, 4.0), (1, 1))
    clip = dpoptax.schedules.Schedule((1.0, 10.0), (1, 1))
    tx = transformation(mechanisms.DiscreteGaussian(), noise, clip)
    params, grads = jnp.zeros(20_000), jnp.zeros((2, 20_000))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for stddev in (1.0, 40.0):
        noisy, state = update(grads, state, params)
        assert abs(float(noisy.std()) / stddev - 1) < 4.5 / math.sqrt(2 * 20_000)


@pytest.mark.slow
def test_parameters_in_16_bits_and_float64_work():
    half = release(jnp.ones((2, 100), jnp.bfloat16), mechanisms.DiscreteGaussian())
    assert half.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = release(jnp.ones((2, 100), jnp.float64), mechanisms.DiscreteGaussian())
        assert wide.dtype == jnp.float64


def test_a_grid_that_does_not_fit_is_refused():
    grads = jnp.zeros((2, 200_000))
    with pytest.raises(ValueError, match=r"too coarse: rounding 200000 .* more than 6 bits"):
        release(grads, mechanisms.DiscreteGaussian(bits=6))
    with pytest.raises(ValueError, match=r"may not fit into 32 bits.*less than 24 bits"):
        release(jnp.zeros((500, 3)), mechanisms.DiscreteGaussian(bits=24))
    with pytest.raises(ValueError, match="exact noise needs a positive noise_multiplier"):
        transformation(mechanisms.DiscreteGaussian(), noise_multiplier=0.0)
    with pytest.raises(ValueError, match="finite l2_clip"):
        transformation(mechanisms.DiscreteGaussian(), l2_clip=math.inf)
    with pytest.raises(ValueError, match="bits must be at most 24"):
        mechanisms.DiscreteGaussian(bits=25)
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        mechanisms.Gaussian(num_draws=0)


def test_a_plan_passes_its_mechanism_to_the_json_and_the_report():
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(100, 10), clip=1.0, noise_multiplier=1.0, num_steps=5,
        delta=1e-4, mechanism=mechanisms.DiscreteGaussian(bits=12),
    )  # fmt: skip
    assert dpoptax.Plan.from_json(plan.to_json()) == plan
    assert "discrete Gaussian of 2**12 grid steps" in str(dpoptax.Report.from_plan(plan))
    with pytest.raises(TypeError, match="mechanism"):
        dpoptax.Plan(
            sampler=plan.sampler, clip=1.0, noise_multiplier=1.0, num_steps=5, delta=1e-4,
            mechanism="exact",
        )  # fmt: skip
    unknown = plan.to_json().replace('"DiscreteGaussian"', '"approximate"')
    with pytest.raises(ValueError, match="unknown kind of Mechanism: 'approximate'"):
        dpoptax.Plan.from_json(unknown)


def test_an_empty_batch_releases_noise():
    tx = dpoptax.privatize(
        1.0,
        1.0,
        expected_batch_size=4,
        key=jax.random.key(0),
        mechanism=dpoptax.mechanisms.DiscreteGaussian(),
    )
    release, _ = tx.update({"w": jnp.zeros((0, 3))}, tx.init(None), {"w": jnp.zeros(3)})
    assert np.all(np.isfinite(release["w"]))
    assert np.linalg.norm(release["w"]) > 0
