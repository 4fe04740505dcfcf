"""The table of norm rules and the choice of the cheapest."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from rule_laws import BATCH, floats, ids, sites_of

import dpoptax
from dpoptax.per_example._norm_rules import choose_rule, cost_model, is_materialized, select
from dpoptax.per_example._norm_rules.materialize import Materialize
from dpoptax.per_example._norm_rules.matmul import DirectMatmul, OuterProduct


def product(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def tied(w, i):
    return jnp.sum(jnp.tanh(jnp.tanh(w[i]) @ w.T))


def convolution(w, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    output = jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=numbers)
    return jnp.sum(jnp.tanh(output))


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example", "name"),
    [
        (product, (64, 64), floats(64), "outer"),
        (product, (64, 64), floats(256, 64), "direct"),
        (product, (64, 64), floats(4, 64), "Gram"),
        (lambda w, i: jnp.sum(jnp.tanh(w[i])), (40, 8), ids(5), "segments"),
        (tied, (40, 8), ids(3), "segments, Gram"),
        (convolution, (3, 3, 8, 8), floats(32, 32, 8), "patches"),
        (convolution, (3, 3, 256, 256), floats(4, 4, 256), "pixel Gram"),
        (lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w.T), (8, 9), floats(3, 8), "direct"),
    ],
)
def test_the_cheapest_rule_is_used(loss_fn, shape, example, name):
    sites, spec = sites_of(loss_fn, shape, example)
    rule = choose_rule(sites, spec)
    assert rule.name == name
    others = [kind.matches(sites, spec) for kind in select.RULES]
    assert all(rule.cost <= other.cost for other in others if other is not None)
    assert rule.cost > 0


def in_scan(w, x):
    """The product of every row by itself, as in a recurrent cell."""
    return jax.lax.scan(lambda total, row: (total + product(w, row), None), 0.0, x)[0]


def sliced(w, x):
    """A scan over layers, each with its own rows of the weight."""
    return jax.lax.scan(lambda total, layer: (total + product(layer, x), None), 0.0, w)[0]


def test_runs_of_a_scan_cost_as_much_as_rows():
    """Else a weight in a scan would seem 256 times cheaper to materialize than it is."""
    rows, scanned = (sites_of(loss, (64, 64), floats(256, 64)) for loss in (product, in_scan))
    assert Materialize.matches(*scanned).cost == Materialize.matches(*rows).cost
    assert isinstance(choose_rule(*scanned), DirectMatmul)
    layers = Materialize.matches(*sites_of(sliced, (5, 64, 64), floats(256, 64)))
    assert layers.cost == 5 * Materialize.matches(*rows).cost


def test_a_new_rule_is_one_class_and_one_line(monkeypatch):
    @dataclasses.dataclass(frozen=True, eq=False)
    class Free(OuterProduct):
        name = "free"
        cost = 0.0

    monkeypatch.setattr(select, "RULES", (*select.RULES, Free))
    (row,) = dpoptax.explain(product, jnp.ones((4, 3)), jnp.ones((BATCH, 4)))
    assert row.rule == "free"


def test_gradients_are_materialized_where_that_is_cheaper():
    def materialized(shape, rows, batch):
        return is_materialized(
            choose_rule(*sites_of(product, shape, floats(rows, shape[0]))), batch
        )

    assert materialized((32, 32), 64, 128)
    assert not materialized((32, 32), 64, cost_model.MAX_MATERIALIZED_FLOATS)  # a huge batch
    assert not materialized((300, 300), 2, 16)  # much larger than the factors
    assert not materialized((32, 32), 1, 16)  # norms of outer products cost nothing
