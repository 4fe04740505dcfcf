"""A large table that is tied to the output costs no more memory than a plain gradient."""

import jax
import jax.numpy as jnp
import optax
import pytest

import dpoptax

ROWS, WIDTH, TOKENS = 2**18, 64, 1024


@pytest.mark.slow  # compiles programs of gigabytes, and runs none of them
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tied_table_of_256k_rows_needs_the_memory_of_a_plain_step(dtype):
    def loss_fn(params, tokens):
        table = params["table"].astype(dtype)
        hidden = jnp.tanh(table[tokens[:-1]] @ params["w"].astype(dtype))
        logits = (hidden @ table.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    def plain(params, batch):
        return jax.grad(lambda params: jax.vmap(loss_fn, (None, 0))(params, batch).mean())(params)

    def private(params, batch):
        grads = dpoptax.per_example_grads(loss_fn)(params, batch)
        return grads.clip_and_sum(dpoptax.clipping.FlatClip(1.0).weights)

    params = {
        "table": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
        "w": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32),
    }
    batch = jax.ShapeDtypeStruct((1, TOKENS + 1), jnp.int32)

    def memory(step):
        compiled = jax.jit(step).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(private) <= 1.25 * memory(plain)
