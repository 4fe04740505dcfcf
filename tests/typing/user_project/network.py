"""A network in NNX: `dpoptax.nnx.loss_fn`, and the optimizer of NNX with private gradients."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dpoptax

x = jax.random.normal(jax.random.key(0), (200, 4))
y = (x[:, 0] > x[:, 1]).astype(jnp.int32)


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(inputs)))


def loss(model: Classifier, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    inputs, label = example
    return -jax.nn.log_softmax(model(inputs))[label]


plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(200, 50),
    clip=dpoptax.clipping.AutoSClip(1.0),
    noise_multiplier=1.0,
    num_steps=3,
    delta=1e-4,
)
model = Classifier(nnx.Rngs(0))
loss_fn, params = dpoptax.nnx.loss_fn(model, loss)
result = dpoptax.training.fit(
    loss_fn, params, (x, y), plan=plan, optimizer=optax.adam(0.02), key=jax.random.key(1)
)
nnx.update(model, result.params)
print(result.report())

# The same by hand.
grads_fn = dpoptax.value_and_per_example_grads(loss_fn)
optimizer = dpoptax.nnx.Optimizer(
    model, optax.chain(plan.privatize(jax.random.key(2)), optax.sgd(0.1)), wrt=nnx.Param
)
sampler_state, batch = plan.sampler.sample(plan.sampler.init(jax.random.key(3)))
examples = dpoptax.samplers.take((x, y), batch)
losses, grads = grads_fn(nnx.state(model, nnx.Param), examples, mask=batch.mask)
optimizer.update(model, grads)
print(losses.mean(), sampler_state)
