"""The automatic choice of a form, and the figures of devices that it reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import by_leaf

import dpoptax
from dpoptax.per_example import _choose_form, _streaming
from dpoptax.per_example import _devices as devices
from dpoptax.per_example._factored import FactoredGrads
from dpoptax.per_example._microbatched import MicrobatchedGrads
from dpoptax.per_example._recomputed import RecomputedGrads

BATCH, TOKENS, WIDTH, LAYERS, ROWS, RANK = 6, 12, 16, 3, 24, 1
MASK = jnp.array([True, True, False, True, True, True])
WEIGHTS = jnp.array([0.3, 0.0, 2.0, 1.0, 0.7, 0.1])


def normal(number, *shape):
    return jax.random.normal(jax.random.key(number), shape)


def adapter_loss(base, params, x, wrap=lambda f: f):
    """Scanned layers with a frozen matrix and a trained adapter each."""

    @wrap
    def layer(x, weights):
        frozen, a, b = weights
        return jnp.tanh(x @ frozen + (x @ a) @ b), None

    return jnp.mean(jax.lax.scan(layer, x, (base, params["a"], params["b"]))[0] ** 2)


BASE = normal(0, LAYERS, WIDTH, WIDTH)
ADAPTERS = {"a": normal(1, LAYERS, WIDTH, RANK), "b": normal(2, LAYERS, RANK, WIDTH)}
INPUTS = normal(3, BATCH, TOKENS, WIDTH)


def tied_loss(params, ids):
    """A tied table around a checkpointed layer, in bfloat16."""
    table = params["table"].astype(jnp.bfloat16)
    x = jax.checkpoint(lambda x: jnp.tanh(x @ params["w"].astype(x.dtype)))(table[ids[:-1]])
    logits = (x @ table.T).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None] % ROWS, axis=1))


TIED = {"table": normal(4, ROWS, WIDTH), "w": normal(5, WIDTH, WIDTH)}
# An index from the end, and one that is beyond the table.
IDS = jax.random.randint(jax.random.key(6), (BATCH, TOKENS), 0, ROWS).at[1, 2:4].set([-3, 2**30])


def product_loss(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def grads_of(loss_fn, params, batch, **options):
    """Gradients whose arrays are abstract: only their form and structure can be read."""
    found = []

    def trace(params, batch):
        found.append(dpoptax.per_example_grads(loss_fn, **options)(params, batch))

    jax.eval_shape(trace, params, batch)
    return found[0]


def assert_same_as_stacked(loss_fn, params, batch, tolerance=1e-5, **options):
    """Compares norms and sums, under a mask; returns the norms."""

    @jax.jit
    def read(params, batch):
        results = []
        for form in (options, {"form": "stacked"}):
            grads = dpoptax.per_example_grads(loss_fn, **form)(params, batch, mask=MASK)
            results.append((grads.squared_norms(), grads.weighted_sum(by_leaf(WEIGHTS, params))))
        return results

    (norms, sums), (exact, exact_sums) = read(params, batch)
    for a, b in zip(jax.tree.leaves(norms), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance)
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(exact_sums))
    for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(exact_sums), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


def use_device(monkeypatch, kind, platform="tpu"):
    monkeypatch.setattr(devices, "kind_of_device", lambda: (kind, platform))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_small_gradients_in_a_scan_are_held_instead_of_factors(wrap):
    def loss_fn(params, x):
        return adapter_loss(BASE, params, x, wrap)

    grads = grads_of(loss_fn, ADAPTERS, INPUTS)
    # One pass gives everything, also under a checkpoint.
    assert isinstance(grads, FactoredGrads)
    assert not grads.factors
    assert_same_as_stacked(loss_fn, ADAPTERS, INPUTS)
    explanation = dpoptax.explain(loss_fn, ADAPTERS, INPUTS)
    assert {row.why for row in explanation} == {"much smaller than its factors"}
    assert sum(row.num_bytes for row in explanation) == 4 * 2 * LAYERS * WIDTH * RANK


def test_gradients_that_exceed_the_model_are_not_held(monkeypatch):
    def loss_fn(params, x):
        return adapter_loss(BASE, params, x, jax.checkpoint)

    many = jnp.tile(INPUTS, (8, 1, 1))
    assert isinstance(grads_of(loss_fn, ADAPTERS, many), RecomputedGrads)
    monkeypatch.setattr(_streaming, "MAX_HELD_PART", 0)
    assert isinstance(grads_of(loss_fn, ADAPTERS, INPUTS), RecomputedGrads)


def test_a_recomputed_tied_table_keeps_no_cotangents_of_its_product():
    grads = grads_of(tied_loss, TIED, IDS)
    assert isinstance(grads, RecomputedGrads)
    assert len(grads.norms) == 2
    assert not grads.kept.factors
    # The reference sums in bfloat16 within an example.
    assert_same_as_stacked(tied_loss, TIED, IDS, tolerance=0.03)


def test_a_batch_beyond_the_memory_is_processed_in_microbatches(monkeypatch):
    params = normal(7, WIDTH, WIDTH)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    (row,) = dpoptax.explain(product_loss, params, INPUTS)
    two_fit = 2.5 * row.num_bytes / devices.current_device().memory
    monkeypatch.setattr(_choose_form, "MEMORY_FRACTION", two_fit)
    assert isinstance(grads_of(product_loss, params, INPUTS), MicrobatchedGrads)
    assert_same_as_stacked(product_loss, params, INPUTS)
    summary = dpoptax.explain(product_loss, params, INPUTS).summary
    assert summary.startswith("form: factored, in microbatches of 2: one backward pass; the whole")
    # A size that the user chose is not divided again.
    grads = grads_of(product_loss, params, INPUTS, microbatch_size=3)
    assert grads.parts.size == 3 if hasattr(grads, "parts") else grads.microbatch_size == 3
    # If not even one example fits, its factors are not kept at all.
    monkeypatch.setattr(_choose_form, "MEMORY_FRACTION", 1e-9)
    assert isinstance(grads_of(product_loss, params, INPUTS), RecomputedGrads)


@pytest.mark.parametrize(
    ("kind", "platform", "found"),
    [
        ("TPU v5 lite", "tpu", "TPU v5 lite"),
        ("TPU v5", "tpu", "TPU v5"),
        ("NVIDIA H100 80GB HBM3", "gpu", "NVIDIA H100"),
        ("NVIDIA A100-SXM4-80GB", "gpu", "NVIDIA A100"),
        ("NVIDIA B300", "gpu", "NVIDIA A100-SXM4-40GB"),
        ("TPU v9", "tpu", "TPU v5 lite"),
        ("METAL", "METAL", "NVIDIA A100-SXM4-40GB"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_unknown_devices_are_taken_for_small_ones(kind, platform, found):
    assert devices.device_named(kind, platform).kind == found


def test_the_device_is_that_of_the_mesh():
    assert devices.current_device().kind == "cpu"
    described = jax.sharding.AbstractDevice(
        device_kind="TPU v5 lite", num_cores=None, platform="tpu"
    )
    mesh = jax.sharding.AbstractMesh((4,), ("x",), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        assert devices.current_device().kind == "TPU v5 lite"
    for kind in ("NVIDIA H200", "TPU v6 lite"):
        assert (
            devices.device_named(kind, "").narrow_flops
            > 5 * devices.device_named(kind, "").wide_flops
        )


def test_other_devices_have_their_own_costs_and_the_same_numbers(monkeypatch):
    params, batch = normal(8, 64, 64), normal(9, BATCH, 40, 64)

    def loss_fn(w, x):
        return product_loss(w, x)

    (on_cpu,) = dpoptax.explain(loss_fn, params, batch)
    use_device(monkeypatch, "TPU v6 lite")
    (on_tpu,) = dpoptax.explain(loss_fn, params, batch)
    # Moving a float costs more multiplications there, so the smaller product is cheaper.
    assert (on_cpu.form, on_tpu.form) == ("materialized", "factored")
    assert (on_cpu.rule, on_tpu.rule) == ("direct", "Gram")
    assert "TPU v6 lite" in dpoptax.explain(loss_fn, params, batch).summary
    assert_same_as_stacked(loss_fn, params, batch)


def test_explain_shows_what_a_form_does_not_serve_and_why():
    def loss_fn(params, x):
        once = jnp.tanh(x @ params["once"])
        twice = jnp.tanh(once @ params["twice"]) @ params["twice"]
        return jnp.sum(jnp.sort(params["sorted"]) * twice)

    params = {
        "once": normal(1, WIDTH, WIDTH),
        "sorted": jnp.ones(WIDTH),
        "twice": normal(2, WIDTH, WIDTH),
    }
    explanation = dpoptax.explain(loss_fn, params, INPUTS, form="recomputed")
    once, ordered, twice = explanation
    assert (once.form, once.num_bytes) == ("recomputed", 0)
    assert (ordered.form, ordered.rule) == ("stacked", "used by sort")
    assert twice.form == "materialized"
    assert twice.why == "its 2 uses must be seen together"
    assert "chosen by the caller" in str(explanation)
    with pytest.raises(ValueError, match="form must be one of auto, factored"):
        dpoptax.explain(loss_fn, params, INPUTS, form="ghost")


def test_a_step_of_held_gradients_costs_the_multiplications_of_a_plain_one():
    def loss_fn(params, x):
        return adapter_loss(BASE, params, x, jax.checkpoint)

    def plain(params, rows):
        return jax.grad(lambda params: jnp.mean(jax.vmap(loss_fn, (None, 0))(params, rows)))(params)

    def private(form, params, rows):
        grads = dpoptax.per_example_grads(loss_fn, form=form)(params, rows)
        return grads.clip_and_sum(dpoptax.clipping.FlatClip(1.0).weights)

    def flops(function):
        return jax.jit(function).lower(ADAPTERS, INPUTS).compile().cost_analysis()["flops"]

    assert flops(functools.partial(private, "auto")) < 1.1 * flops(plain)
