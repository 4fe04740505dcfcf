"""A small convolutional network, trained end to end, with tanh (arXiv:2007.14191).

Clip, and rate times steps, are those of the CNN of arXiv:2011.11660, with larger batches.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import dpoptax
from dpoptax.transforms import average_params, averaged_params
from leaderboard.recipe import Recipe, Trained, plan_for

STEPS = 1500


class Network(nn.Module):
    @nn.compact
    def __call__(self, image):
        values = 2 * image[..., None] - 1
        values = jnp.tanh(nn.Conv(16, (8, 8), strides=2)(values))
        values = nn.avg_pool(values, (2, 2))
        values = jnp.tanh(nn.Conv(32, (4, 4), strides=2, padding="VALID")(values))
        values = nn.avg_pool(values, (2, 2))
        values = values.reshape(*values.shape[:-3], -1)
        return nn.Dense(10)(jnp.tanh(nn.Dense(32)(values)))


def loss_fn(params, example):
    image, label = example
    logits = Network().apply({"params": params}, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def train(data, epsilon, delta, seed):
    rate = min(2.0, 0.45 * epsilon)  # the noise of all steps together is the same at each epsilon
    plan = plan_for(num_examples=len(data.train_labels), expected_batch_size=2048, num_steps=STEPS,
                    epsilon=epsilon, delta=delta, clip=0.1)  # fmt: skip
    result = dpoptax.training.fit(
        loss_fn,
        Network().init(jax.random.key(seed), data.train_inputs[0])["params"],
        (data.train_inputs, data.train_labels),
        plan=plan,
        optimizer=optax.chain(optax.sgd(rate, momentum=0.9), average_params(start=STEPS - 300)),
        key=jax.random.key(seed),
        progress=False,
    )
    params = averaged_params(result.state.opt_state)
    predict = jax.jit(lambda images: Network().apply({"params": params}, images))
    return Trained(predict, params, result.epsilon())


RECIPE = Recipe(name="mnist_cnn", task="mnist", title="convolutional network, end to end",
                tuned="from published settings", train=train, seconds=900)  # fmt: skip
