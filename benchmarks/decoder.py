"""A decoder in plain JAX, as language models are trained: scanned layers, remat, bfloat16.

The table of the tokens is also the output layer. Weights are float32 and are cast to bfloat16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dpoptax


class Sizes(NamedTuple):
    """The sizes of a decoder and of its batch."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    tokens: int
    batch: int


def param_specs(sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the parameters."""
    d, n = sizes.width, sizes.layers
    shapes = {
        "table": (sizes.vocabulary, d),
        **dict.fromkeys(("query", "key", "value", "out"), (n, d, d)),
        **dict.fromkeys(("gate", "up"), (n, d, 4 * d)),
        "down": (n, 4 * d, d),
        "attention_scale": (n, d),
        "mlp_scale": (n, d),
        "final_scale": (d,),
    }
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def token_specs(sizes: Sizes) -> jax.ShapeDtypeStruct:
    """Returns the shape of a batch of tokens."""
    return jax.ShapeDtypeStruct((sizes.batch, sizes.tokens + 1), jnp.int32)


def sharded(
    mesh: Mesh, params: dict[str, jax.ShapeDtypeStruct], tokens: jax.ShapeDtypeStruct
) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """Shards matrices by their rows, and the batch, over the one axis of a mesh (FSDP)."""
    (axis,) = mesh.axis_names

    def place(spec: jax.ShapeDtypeStruct, *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    placed = {}
    for name, spec in params.items():
        rows = () if name.endswith("scale") else (axis,) if name == "table" else (None, axis)
        placed[name] = place(spec, *rows)
    return placed, place(tokens, axis)


def loss_fn(sizes: Sizes) -> Callable[[dict[str, jax.Array], jax.Array], jax.Array]:
    """Returns the mean cross-entropy of the next tokens of one sequence."""
    dtype, heads = jnp.bfloat16, sizes.heads

    def normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
        size = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return x * jax.lax.rsqrt(size + 1e-6).astype(dtype) * scale.astype(dtype)

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        tokens, width = x.shape
        causal = jnp.tril(jnp.ones((tokens, tokens), bool))
        h = normalized(x, w["attention_scale"])
        query, key, value = (
            (h @ w[name].astype(dtype)).reshape(tokens, heads, width // heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("qhd,khd->hqk", query, key).astype(jnp.float32)
        scores = scores / np.sqrt(width // heads).astype(np.float32)
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1).astype(dtype)
        mixed = jnp.einsum("hqk,khd->qhd", weights, value).reshape(tokens, width)
        x = x + mixed @ w["out"].astype(dtype)
        h = normalized(x, w["mlp_scale"])
        gate, up = (h @ w[name].astype(dtype) for name in ("gate", "up"))
        return x + (jax.nn.silu(gate) * up) @ w["down"].astype(dtype), None

    def loss(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        x = params["table"].astype(dtype)[tokens[:-1]]
        outside = ("table", "final_scale")
        layers = {name: leaf for name, leaf in params.items() if name not in outside}
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, layers)
        x = normalized(x, params["final_scale"])
        logits = (x @ params["table"].astype(dtype).T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    return loss


def step_of(form: str, sizes: Sizes) -> Callable[[Any, Any, Any], Any]:
    """Returns a step of SGD, `(params, tokens, key) -> params`: "plain", or private in a form."""
    loss = loss_fn(sizes)

    def update(params: Any, direction: Any) -> Any:
        return jax.tree.map(lambda leaf, change: leaf - 1e-3 * change, params, direction)

    def plain(params: Any, tokens: Any, key: Any) -> Any:
        del key
        mean = lambda params: jax.vmap(loss, (None, 0))(params, tokens).mean()  # noqa: E731
        return update(params, jax.grad(mean)(params))

    def private(params: Any, tokens: Any, key: Any) -> Any:
        grads = dpoptax.per_example_grads(loss, form=form)(params, tokens)
        tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=sizes.batch, key=key)
        return update(params, tx.update(grads, tx.init(params), params)[0])

    return plain if form == "plain" else private
