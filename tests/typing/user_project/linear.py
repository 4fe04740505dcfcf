"""The first program of the README, with types: `fit`, a plan and a report."""

import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax.training import FitResult

Params = dict[str, jax.Array]
Example = tuple[jax.Array, jax.Array]

x = jax.random.normal(jax.random.key(1), (500, 8))
y = (x[:, 0] > x[:, 1]).astype(jnp.int32)


def logits_of(params: Params, image: jax.Array) -> jax.Array:
    return image @ params["w"] + params["b"]


def loss_fn(params: Params, example: Example) -> jax.Array:
    image, digit = example
    logits = logits_of(params, image)
    return -jax.nn.log_softmax(logits)[digit]


plan = dpoptax.Plan.calibrate(
    num_examples=500, expected_batch_size=100, epochs=4, epsilon=2.0, delta=1e-4, clip=1.0
)
result: FitResult = dpoptax.training.fit(
    loss_fn,
    {"w": jnp.zeros((8, 2)), "b": jnp.zeros(2)},
    (x, y),
    plan=plan,
    optimizer=optax.sgd(2.0),
    key=jax.random.key(0),
)
params: Params = result.params
guesses = jnp.argmax(logits_of(params, x), axis=1)
report = result.report()
epsilon: float = result.epsilon()
print("accuracy", jnp.mean(guesses == y), "epsilon", epsilon, report.epsilon, plan.num_steps)
print(report.to_json())
again: dpoptax.Plan = dpoptax.Plan.from_json(plan.to_json()).replace(num_steps=3)
print(again.epsilon() < epsilon)
print(dpoptax.explain(loss_fn, params, (x[:2], y[:2])))
