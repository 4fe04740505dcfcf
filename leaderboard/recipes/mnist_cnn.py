"""A small convolutional network that starts with Gabor filters. All of its layers are trained."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import dpoptax
from dpoptax.transforms import average_params
from leaderboard.filters import gabor_filters, group_normalized
from leaderboard.recipe import Recipe, Trained, plan_for

STEPS = 300


class Network(nn.Module):
    @nn.compact
    def __call__(self, image):
        edges = nn.Conv(16, (7, 7), strides=2, kernel_init=gabor_filters)(image[..., None])
        edges = nn.relu(jnp.concatenate([edges, -edges], axis=-1))
        edges = group_normalized(nn.avg_pool(edges, (2, 2), (2, 2)), 8)
        shapes = group_normalized(nn.relu(nn.Conv(32, (3, 3))(edges)), 8)
        values = jnp.concatenate([edges, shapes], axis=-1)
        values = values.reshape(*values.shape[:-3], -1)
        return nn.Dense(10, kernel_init=nn.initializers.zeros)(values)


def loss_fn(params, example):
    logits = Network().apply({"params": params}, example[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, example[1])


def train(data, epsilon, delta, seed):
    rate = min(0.6, 0.2 * epsilon)  # the noise of all steps together is the same at each epsilon
    plan = plan_for(num_examples=len(data.train_labels), expected_batch_size=4096, num_steps=STEPS,
                    epsilon=epsilon, delta=delta, clip=1.0)  # fmt: skip
    key, examples = jax.random.key(seed), (data.train_inputs, data.train_labels)
    result = dpoptax.training.fit(
        loss_fn, Network().init(key, examples[0][0])["params"], examples, plan=plan, key=key,
        optimizer=optax.chain(optax.sgd(rate, momentum=0.9), average_params(start=STEPS - 90)),
        progress=False,
    )  # fmt: skip
    params = result.averaged_params
    predict = jax.jit(lambda images: Network().apply({"params": params}, images))
    return Trained(predict, params, result.epsilon(), result)


RECIPE = Recipe(
    name="mnist_cnn", task="mnist", title="convolutional network, end to end", train=train,
    tuned="on training examples held out", seconds=700,
    notes="Five short runs were compared on the last 10,000 training images.",
)  # fmt: skip
