"""A decoder on a mesh with explicit axes: scan, remat, tied table, bfloat16, against float64."""

import pytest
from eight_devices import run_on_eight_devices

PROGRAM = """
import re, jax, jax.numpy as jnp, numpy as np, optax, dpoptax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

WIDTH, LAYERS, HEADS, VOCABULARY, TOKENS, BATCH = 32, 2, 4, 64, 12, 16
SHAPES = {"table": (VOCABULARY, WIDTH), "qkv": (LAYERS, WIDTH, 3 * WIDTH),
          "out": (LAYERS, WIDTH, WIDTH), "up": (LAYERS, WIDTH, 2 * WIDTH),
          "down": (LAYERS, 2 * WIDTH, WIDTH), "scale": (LAYERS, WIDTH)}
# Fully sharded over one axis; and over one axis with tensor parallelism over the other.
LAYOUTS = {
    (8,): {"table": P("data"), "scale": P(None, "data")},
    (2, 4): {"table": P("model", "data"), "qkv": P(None, "data", "model"),
             "out": P(None, "model", "data"), "up": P(None, "data", "model"),
             "down": P(None, "model", "data"), "scale": P()},
}
rng = np.random.default_rng(0)
start = {name: (0.3 * rng.normal(size=shape) + (name == "scale")).astype(np.float32)
         for name, shape in SHAPES.items()}
tokens = rng.integers(0, VOCABULARY, (BATCH, TOKENS + 1)).astype(np.int32)

def loss_in(dtype):
    def loss(params, tokens):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        x = params["table"][tokens[:-1]]
        causal = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))

        def layer(x, w):
            wide = jnp.promote_types(dtype, jnp.float32)
            size = jnp.mean(jnp.square(x.astype(wide)), -1, keepdims=True)
            h = x * jax.lax.rsqrt(size + 1e-6).astype(dtype) * w["scale"]
            q, k, v = jnp.split((h @ w["qkv"]).reshape(TOKENS, HEADS, -1), 3, axis=-1)
            scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(WIDTH // HEADS).astype(dtype)
            weights = jax.nn.softmax(jnp.where(causal, scores, np.asarray(-1e4, dtype)), axis=-1)
            x = x + jnp.einsum("hqk,khd->qhd", weights, v).reshape(TOKENS, WIDTH) @ w["out"]
            return x + jax.nn.silu(x @ w["up"]) @ w["down"], None

        x, _ = jax.lax.scan(
            jax.checkpoint(layer), x, {name: params[name] for name in params if name != "table"})
        logits = (x @ params["table"].T).astype(jnp.promote_types(dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()
    return loss

def released(dtype, params, tokens, noise):
    tx = dpoptax.privatize(1.0, noise, expected_batch_size=1, key=jax.random.key(0))

    def step(params, tokens):
        assert dpoptax.explain(loss_in(dtype), params, tokens)  # the default form is understood
        grads = dpoptax.per_example_grads(loss_in(dtype))(params, tokens)
        return tx.update(grads, tx.init(params), params)[0]

    return jax.jit(step)(params, tokens)

def flat(tree):
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in SHAPES])

def placed(sizes, spec):
    mesh = jax.make_mesh(sizes, ("data", "model")[: len(sizes)],
                         axis_types=(AxisType.Explicit,) * len(sizes))
    shardings = {name: NamedSharding(mesh, spec.get(name, P(None, "data"))) for name in SHAPES}
    rows = NamedSharding(mesh, P(mesh.axis_names))
    return jax.device_put(start, shardings), jax.device_put(tokens, rows)

with jax.enable_x64(True):
    wide = {name: leaf.astype(np.float64) for name, leaf in start.items()}
    grads = jax.jit(jax.vmap(jax.grad(loss_in(np.float64)), (None, 0)))(wide, tokens)
    rows = np.concatenate([np.asarray(grads[n]).reshape(BATCH, -1) for n in SHAPES], axis=1)
clipped = rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True))
exact = clipped.sum(axis=0)
size = np.linalg.norm(exact)
assert np.linalg.norm(rows.sum(axis=0) - exact) > size  # clipping matters
assert np.linalg.norm(clipped[0]) > 0.05 * size  # and so does each example

one = released(np.float32, start, tokens, 1.0)
for sizes, spec in LAYOUTS.items():
    params, batch = placed(sizes, spec)
    many = released(np.float32, params, batch, 1.0)
    for name in SHAPES:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-5, err_msg=str(sizes))
        assert many[name].sharding.is_equivalent_to(params[name].sharding, many[name].ndim)
# Both layouts have the noise of one device, so one sum without noise checks all three. It is
# rounded to bfloat16 at each operation.
narrow = released(jnp.bfloat16, params, batch, 0.0)
error = np.linalg.norm(flat(narrow) - exact) / size
assert error < 0.04, error
assert np.linalg.norm(flat(one) - exact) > size  # the noise is there

# Each device draws its own part of the noise: no array of random words is larger than that.
for name, leaf in params.items():
    def noise(key, leaf):
        zeros = jnp.zeros_like(leaf)
        return dpoptax.mechanisms._gaussian_noise.add_gaussian(key, zeros, 1.0)
    text = jax.jit(noise, out_shardings=leaf.sharding).lower(
        jax.random.key(0), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).compile().as_text()
    words = [np.prod([int(d) for d in dims.split(",")]) for dims in
             re.findall(r"[uf]32\\[([\\d,]+)\\]", text)]
    part = np.prod(leaf.sharding.shard_shape(leaf.shape))
    assert words and max(words) <= part, (name, max(words), part)
    assert "all-gather" not in text and "all-to-all" not in text, name
print("decoder as in float64")
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_a_decoder_on_explicit_axes_gives_the_clipped_sum_of_float64():
    printed = run_on_eight_devices(PROGRAM)
    assert "decoder as in float64" in printed
