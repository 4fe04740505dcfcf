"""Norm rule for lookups of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_laws import check_laws, floats, ids, sites_of

from dpoptax.per_example._norm_rules import embedding
from dpoptax.per_example._norm_rules.embedding import EmbeddingLookup, segment_squared_norms


def lookup(w, i):
    return jnp.sum(jnp.tanh(w[i]))


def clipped(w, i):
    return jnp.sum(jnp.tanh(w.at[i].get(mode="clip")))


def filled(w, i):
    return jnp.sum(jnp.tanh(w.at[i].get(mode="fill", fill_value=0)))


def inside_a_scan(w, i):
    return jnp.sum(jax.lax.map(lambda i: jnp.tanh(w[i]), i))


def sliced_by_a_scan(w, i):
    return jnp.sum(jax.lax.map(lambda w: jnp.tanh(w[i]), w))


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (lookup, (4, 3), ids(9)),
        (lookup, (40, 3), ids(2, 3)),
        (lookup, (4, 2, 3), ids(5)),
        (clipped, (4, 3), ids(9)),
        (filled, (4, 3), ids(9)),
        (inside_a_scan, (4, 3), ids(2, 5)),
    ],
)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_it_obeys_the_laws(loss_fn, shape, example, on_cpu, monkeypatch):
    monkeypatch.setattr(embedding, "on_cpu", lambda: on_cpu)  # how equal tokens are found
    check_laws(EmbeddingLookup.matches(*sites_of(loss_fn, shape, example)))


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (sliced_by_a_scan, (2, 4, 3), ids(5)),
        (lambda w, i: lookup(w.T, i), (3, 4), ids(5)),
        (lambda w, i: jnp.sum(jnp.tanh(w[:, i])), (3, 4), ids(5)),
        (lambda w, i: jnp.sum(jnp.tanh(w[i, i])), (4, 4), ids(5)),
        (lambda w, i: lookup(w, i) + lookup(w, i + 1), (4, 3), ids(5)),
        (lambda w, x: jnp.sum(jnp.tanh(x @ w)), (4, 3), floats(2, 4)),
    ],
    ids=["sliced", "transposed", "columns", "numbers", "two uses", "product"],
)
def test_other_uses_are_refused(loss_fn, shape, example):
    assert EmbeddingLookup.matches(*sites_of(loss_fn, shape, example)) is None


def test_equal_tokens_are_added_before_they_are_squared():
    tokens = jnp.asarray([[0, 1, 0], [2, 2, 2]])
    rows = jnp.ones((2, 3, 2))
    np.testing.assert_allclose(segment_squared_norms(tokens, rows, 3), [8 + 2, 18], rtol=1e-5)
