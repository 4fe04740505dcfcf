"""Variational autoencoders of MNIST, judged by the evidence lower bound (ELBO)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax.vi.models import bernoulli_vae_loss
from leaderboard import data
from leaderboard.task import Metric, Published, Task


def load():
    """Returns MNIST with flat images."""
    found = data.mnist()
    flat = [images.reshape(len(images), -1) for images in (found.train_inputs, found.test_inputs)]
    return found._replace(train_inputs=flat[0], test_inputs=flat[1])


def score(predict, inputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the negative ELBO per test image, with one draw of the latent and of the pixels each.

    Args:
        predict: `(model, params)`, with methods `encode` and `decode` as in
            `dpoptax.vi.models.DenseVAE`.
        inputs: `(num_test, pixels)`, in [0, 1].
        labels: not used.
    """
    model, params = predict
    loss_fn = bernoulli_vae_loss(model, redraw=True)
    keys = jax.random.split(jax.random.key(0), len(inputs))
    losses = jax.jit(
        lambda rows: jax.lax.map(lambda row: loss_fn(params, *row), rows, batch_size=1000)
    )((jnp.asarray(inputs), keys))
    return {"negative ELBO": float(jnp.mean(losses))}


D3P = "Prediger, Loppi, Kaski and Honkela 2022, arXiv:2103.11648, section 5"

TASK = Task(
    name="mnist_vae",
    title="VAE of MNIST",
    about="60,000 training and 10,000 test images. The score is the negative ELBO in nats per test "
    "image, with standard normal latents and Bernoulli pixels. Each grey pixel is drawn as black "
    "or white, with its value as the probability. The architecture is free.",
    load=load,
    score=score,
    metrics=(Metric("negative ELBO", "nats", higher_is_better=False, digits=1),),
    delta=1 / 60_000,
    epsilons=(0.536, 1.0, 3.0, 8.0, math.inf),
    published=(
        Published("d3p", 0.536, 174.06, D3P, metric="negative ELBO", note="784-400-50 units"),
        Published(
            "TF Privacy", 0.536, 171.26, D3P, metric="negative ELBO", note="784-400-50 units"
        ),
        Published("d3p", math.inf, 99.63, D3P, metric="negative ELBO", note="784-400-50 units"),
    ),
)
