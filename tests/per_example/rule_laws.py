"""What every norm rule must obey, checked on random factors of the sites of a small loss."""

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax.per_example._loss_trace import trace_loss
from dpoptax.per_example._norm_rules import Factors
from dpoptax.per_example._norm_rules.materialize import Materialize

BATCH = 5


def sites_of(loss_fn, shape, example):
    """The sites of a parameter of this shape, and its spec; nothing is computed."""
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = trace_loss(loss_fn, spec, (example,))[0].program.found
    assert found.sites, found.fallback_reasons
    return found.sites, spec


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def random_factors(sites, rows):
    """Factors that a backward pass could have given; ids are below `rows` or just beyond."""
    rng = np.random.default_rng(0)

    def draw(site, spec):
        shape = (BATCH, *(scan.length for scan in site.scans), *spec.shape)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return jnp.asarray(rng.integers(-1, rows + 1, shape), spec.dtype)
        return jnp.asarray(rng.normal(size=shape), spec.dtype)

    return [
        Factors(tuple(draw(site, spec) for spec in site.operands), draw(site, site.output))
        for site in sites
    ]


def poisoned(factors):
    """The same factors with NaN in the second example."""
    return jax.tree.map(
        lambda leaf: leaf.at[1].set(jnp.nan) if leaf.dtype == jnp.float32 else leaf, factors
    )


def check_laws(rule):
    """Norms, gradients and sums are those of materialized gradients, example by example."""
    reference = Materialize.matches(rule.sites, rule.spec)

    @jax.jit
    def run(factors):
        results = rule.squared_norms(factors), rule.gradients(factors), rule.weighted_sum(factors)
        return *results, reference.gradients(factors)

    factors = random_factors(rule.sites, rule.spec.shape[0])
    norms, gradients, total, expected = map(np.asarray, run(factors))
    exact = np.asarray(expected, np.float64)
    exact_norms = np.sum(exact.reshape(BATCH, -1) ** 2, axis=1)
    scale = 1e-5 * np.abs(exact).max()
    np.testing.assert_allclose(norms, exact_norms, rtol=2e-5)
    assert np.all(norms >= exact_norms * (1 - 1e-6))  # never less, but for the reference's rounding
    np.testing.assert_allclose(gradients, exact, rtol=1e-5, atol=scale)
    np.testing.assert_allclose(total, exact.sum(axis=0), rtol=1e-5, atol=BATCH * scale)
    assert norms.dtype == gradients.dtype == total.dtype == np.float32

    others = np.arange(BATCH) != 1
    norms_beside_nan, gradients_beside_nan, _, _ = map(np.asarray, run(poisoned(factors)))
    assert not np.isfinite(norms_beside_nan[1])
    np.testing.assert_allclose(norms_beside_nan[others], norms[others], rtol=1e-6)
    np.testing.assert_allclose(
        gradients_beside_nan[others], gradients[others], rtol=1e-5, atol=scale
    )
