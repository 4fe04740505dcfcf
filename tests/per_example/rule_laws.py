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


def check_laws(*rules):
    """Norms, gradients and sums are those of materialized gradients, example by example.

    Several rules for the same sites share one compiled program, since compiling takes longest.
    """
    sites, spec = rules[0].sites, rules[0].spec
    reference = Materialize.matches(sites, spec)

    @jax.jit
    def run(factors):
        prepared = [(rule, rule.prepare(factors)) for rule in rules]
        results = [
            (rule.squared_norms(ready), rule.gradients(ready), rule.weighted_sum(ready))
            for rule, ready in prepared
        ]
        return results, reference.gradients(factors)

    factors = random_factors(sites, spec.shape[0])
    results, expected = jax.tree.map(np.asarray, run(factors))
    beside_nan, _ = jax.tree.map(np.asarray, run(poisoned(factors)))
    exact = np.asarray(expected, np.float64)
    for result, result_beside_nan in zip(results, beside_nan, strict=True):
        check_values(*result, exact)
        check_independence(result, result_beside_nan)


def check_values(norms, gradients, total, exact):
    assert norms.dtype == gradients.dtype == total.dtype == np.float32
    exact_norms = np.sum(exact.reshape(BATCH, -1) ** 2, axis=1)
    np.testing.assert_allclose(norms, exact_norms, rtol=2e-5, atol=1e-6 * exact_norms.max())
    assert np.all(norms >= exact_norms * (1 - 1e-6))  # never less, but for the reference's rounding
    scale = 1e-5 * np.abs(exact).max()
    np.testing.assert_allclose(gradients, exact, rtol=1e-5, atol=scale)
    np.testing.assert_allclose(total, exact.sum(axis=0), rtol=1e-5, atol=BATCH * scale)


def check_independence(result, result_beside_nan):
    """NaN in the second example changes nothing in the others."""
    (norms, gradients, _), (norms_beside_nan, gradients_beside_nan, _) = result, result_beside_nan
    others = np.arange(BATCH) != 1
    assert not np.isfinite(norms_beside_nan[1])
    np.testing.assert_allclose(norms_beside_nan[others], norms[others], rtol=1e-6)
    scale = 1e-5 * np.abs(gradients).max()
    np.testing.assert_allclose(
        gradients_beside_nan[others], gradients[others], rtol=1e-5, atol=scale
    )
