import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpoptax

X = jax.random.normal(jax.random.key(5), (4, 3))


class Adapted(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(3, 2, rngs=rngs)
        self.lora = nnx.LoRA(3, 1, 2, rngs=rngs)

    def __call__(self, x):
        return self.base(x) + self.lora(x)


def loss(model, x):
    return jnp.sum((model(x) - 1) ** 2)


def private(number, optimizer, noise=0.0):
    key = jax.random.key(number)
    return optax.chain(dpoptax.privatize(1.0, noise, expected_batch_size=4, key=key), optimizer)


@nnx.jit
def train_step(model, optimizer, x):
    loss_fn, _ = dpoptax.nnx.loss_fn(model, loss, wrt=optimizer.wrt)
    params = nnx.state(model, optimizer.wrt)
    optimizer.update(model, dpoptax.per_example_grads(loss_fn)(params, x))


@pytest.mark.seconds
@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam])
def test_it_makes_the_steps_of_a_loop_with_the_same_transformation(wrt):
    model = Adapted()
    optimizer = dpoptax.nnx.Optimizer(model, private(0, optax.sgd(0.1, momentum=0.9)), wrt=wrt)
    loss_fn, params = dpoptax.nnx.loss_fn(model, loss, wrt=wrt)
    tx = private(0, optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)
    before = np.asarray(model.base.kernel[...])
    for _ in range(2):
        train_step(model, optimizer, X)
        grads = dpoptax.per_example_grads(loss_fn)(params, X)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        nnx.state(model, wrt),
        params,
    )
    assert int(optimizer.step[...]) == 2
    assert np.array_equal(before, model.base.kernel[...]) == (wrt is nnx.LoRAParam)


@pytest.mark.seconds
def test_the_noise_is_new_at_each_step():
    """Without slopes, an update is noise. The state of the key must go on from step to step."""
    model = Adapted()
    wrt = nnx.LoRAParam
    optimizer = dpoptax.nnx.Optimizer(model, private(1, optax.sgd(1.0), 1.0), wrt=wrt)
    nothing = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape)), nnx.state(model, wrt))
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nothing))
    first, second = (step(model, optimizer).lora.lora_a[...] for _ in range(2))
    assert float(jnp.abs(first - second).min()) > 1e-4


@pytest.mark.parametrize(
    ("of_optimizer", "of_loss", "message"),
    [
        (nnx.Param, nnx.LoRAParam, "does not clip them: base.bias, base.kernel"),
        (nnx.LoRAParam, nnx.Param, "gradients of parameters that the optimizer leaves out: base"),
    ],
)
def test_gradients_of_other_variables_are_refused(of_optimizer, of_loss, message):
    model = Adapted()
    optimizer = dpoptax.nnx.Optimizer(model, private(2, optax.sgd(1.0)), wrt=of_optimizer)
    loss_fn, params = dpoptax.nnx.loss_fn(model, loss, wrt=of_loss)
    grads = dpoptax.per_example_grads(loss_fn)(params, X)
    with pytest.raises(ValueError, match=message):
        optimizer.update(model, grads)


@pytest.mark.seconds
def test_what_is_not_private_is_refused():
    model = Adapted()
    with pytest.raises(ValueError, match=r"tx must hold privatize.*plan\.privatize\(key\)"):
        dpoptax.nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    tx = private(4, optax.sgd(1.0))
    optimizer = dpoptax.nnx.Optimizer(model, tx, wrt=nnx.Param)
    averaged = nnx.grad(lambda model: jnp.mean(jax.vmap(loss, (None, 0))(model, X)))(model)
    with pytest.raises(ValueError, match="one leading batch axis"):
        optimizer.update(model, averaged)


@pytest.mark.untyped  # `MultiSteps` is no `GradientTransformation`
def test_averaging_before_the_clip_is_refused():
    averaging = optax.MultiSteps(private(3, optax.sgd(1.0)), 2)
    with pytest.raises(ValueError, match="averages gradients before they are clipped"):
        dpoptax.nnx.Optimizer(Adapted(), averaging, wrt=nnx.Param)


def test_the_optimizer_of_nnx_names_the_one_to_use():
    model = Adapted()
    loss_fn, params = dpoptax.nnx.loss_fn(model, loss)
    optimizer = nnx.Optimizer(model, private(5, optax.sgd(1.0)), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"use dpoptax\.nnx\.Optimizer"):
        optimizer.update(model, dpoptax.per_example_grads(loss_fn)(params, X))


def test_a_loss_and_its_parameters_do_not_change_with_the_model():
    model = Adapted()
    loss_fn, params = dpoptax.nnx.loss_fn(model, loss, wrt=nnx.LoRAParam)
    before = loss_fn(params, X[0])
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 1, nnx.state(model)))
    assert loss_fn(params, X[0]) == before
