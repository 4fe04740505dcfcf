"""Norm rule for a table of embeddings that is also the output layer."""

import jax
import jax.numpy as jnp
import pytest
from rule_laws import check_laws, floats, ids, sites_of

from dpoptax.per_example._norm_rules.tied_embedding import TiedEmbedding


def tied(w, i):
    return jnp.sum(jnp.tanh(jnp.tanh(w[i]) @ w.T))


def pooled(w, i):
    return jax.nn.logsumexp(w @ w[i].mean(0))


def by_columns(w, i):
    """The head multiplies by the table itself, so that its inputs have one number per row."""
    return jnp.sum(jnp.tanh(jax.nn.softmax(w[i] @ jnp.ones((3, 7))) @ w))


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("loss_fn", "example", "product"),
    [
        (tied, ids(4), "direct"),
        (tied, ids(2), "Gram"),
        (pooled, ids(4), "outer"),
        (by_columns, ids(4), "direct"),
    ],
)
def test_it_obeys_the_laws_with_the_cheapest_rule_for_the_head(loss_fn, example, product):
    rule = TiedEmbedding.matches(*sites_of(loss_fn, (7, 3), example))
    assert rule.name == f"segments, {product}"
    check_laws(rule)


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (tied, (4, 4), ids(5)),
        (lambda w, i: tied(w, i) + pooled(w, i), (7, 3), ids(5)),
        (lambda w, i: jnp.sum(jnp.tanh(w[i]) @ w[:4].T), (7, 3), ids(5)),
        (lambda w, i: jnp.sum(jnp.tanh(w[i])), (7, 3), ids(5)),
        (lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w.T), (7, 3), floats(2, 7)),
    ],
    ids=["square table", "four uses", "a part of the table", "a lookup alone", "two products"],
)
def test_other_uses_are_refused(loss_fn, shape, example):
    assert TiedEmbedding.matches(*sites_of(loss_fn, shape, example)) is None
