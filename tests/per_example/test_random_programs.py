"""Random programs of random layers against `vmap(grad)`: no architecture was thought of."""

import jax
import jax.numpy as jnp
import pytest
from architectures import KEY, energy, floats
from hypothesis import given
from hypothesis import strategies as st
from test_factored import compare


def scanned(w, x):
    """The weight is shared by the steps."""
    return jax.lax.scan(lambda c, t: (jnp.tanh(c @ w + t), c), x[0], x)[1]


def branched(w, x):
    """The data decide where the weight is used."""
    return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x @ w), lambda x: x * 2, x)


# From a weight (4, 4) and (3, 4) to (3, 4).
LAYERS = {
    "dense": lambda w, x: x @ w,
    "transposed": lambda w, x: x @ w.T,
    "reshaped": lambda w, x: x @ w.reshape(2, 8).reshape(4, 4),
    "left": lambda w, x: (w @ x.T).T,
    "sliced": lambda w, x: x @ w[:, ::-1] + w[1],
    "diagonal": lambda w, x: x * jnp.diagonal(w),
    "lookup": lambda w, x: x + w[jnp.argmax(x, axis=1)],
    "heads": lambda w, x: jnp.einsum("thi,hij->thj", x.reshape(3, 2, 2),
                                     w.reshape(2, 2, 4)[..., :2]).reshape(3, 4),
    "convolution": lambda w, x: jax.lax.conv_general_dilated(
        x.T[None], w.reshape(4, 4, 1), (1,), "SAME")[0].T,
    "grouped": lambda w, x: jax.lax.conv_general_dilated(
        x.T[None], w.reshape(4, 2, 2), (1,), "SAME", feature_group_count=2)[0].T,
    "scan": scanned,
    "cond": branched,
    "checkpoint": lambda w, x: jax.checkpoint(lambda x: jnp.cos(x @ w))(x),
    "jit": lambda w, x: jax.jit(lambda w, x: x @ (2 * w))(w, x),
    "input gradient": lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w) ** 2))(x),
}  # fmt: skip


@pytest.mark.slow
@given(
    program=st.lists(st.tuples(st.sampled_from(sorted(LAYERS)), st.integers(0, 2)),
                     min_size=1, max_size=5),
    batch=st.sampled_from([1, 3]),
)  # fmt: skip
def test_a_random_program_has_the_gradients_of_vmap_grad(program, batch):
    def loss_fn(weights, x):
        for name, number in program:
            x = jnp.tanh(LAYERS[name](weights[number], x)) + 0.1 * x
        return energy(x)

    weights = [0.7 * jax.random.normal(jax.random.fold_in(KEY, i), (4, 4)) for i in range(3)]
    compare(loss_fn, weights, floats(batch, 3, 4))
