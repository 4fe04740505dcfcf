"""A variational autoencoder, trained with differential privacy and without.

A VAE (Kingma and Welling 2014, arXiv:1312.6114) describes an image x by a few latent numbers z. An
encoder gives q(z | x), a decoder gives p(x | z). Each image has its own latents, so the loss of an
image is its negative ELBO, and no two images are coupled. Private training needs no more: the
gradient of each image is clipped, noise is added to their sum, and Adam updates the parameters.

    python examples/05_vae.py                    # scikit-learn's digits, less than a minute
    python examples/05_vae.py --dataset mnist    # MNIST through TensorFlow Datasets, longer
    python examples/05_vae.py --help

It prints the test loss of the private model, of a model trained without privacy for the same number
of steps, and of an untrained one. Then it prints the privacy statement and draws images from both
models. It needs matplotlib and scikit-learn: pip install 'dpoptax[examples]'.
"""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import example_data
import example_options
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import dpoptax
from dpoptax.vi.models import DenseVAE, bernoulli_vae_loss

DESCRIPTION = (
    "Trains a VAE with differential privacy and without, and draws images from both. "
    "The digits take less than a minute. MNIST takes about ten minutes on two cores, half of them "
    "for the model without privacy; --epochs 20 is the length of the published experiment."
)

DEFAULTS = {
    "digits": example_options.Defaults(
        epochs=125, batch_size=128, epsilon=4.0, delta=1e-4, l2_clip=3.0, learning_rate=7e-3
    ),
    "mnist": example_options.Defaults(
        epochs=5, batch_size=128, epsilon=1.0, delta=1e-5, l2_clip=10.0, learning_rate=1e-3
    ),
}


# 1. Data: images as flat rows of pixels in [0, 1]

LOADERS = {"digits": example_data.digits, "mnist": example_data.mnist}


def load_images(dataset: str) -> example_data.Data:
    data = LOADERS[dataset]()
    return data._replace(
        train_inputs=data.train_inputs.reshape(len(data.train_inputs), -1),
        test_inputs=data.test_inputs.reshape(len(data.test_inputs), -1),
    )


# 2. Model: `dpoptax.vi.models.DenseVAE`, one hidden layer in the encoder and in the decoder


MODELS = {
    # Small, because every parameter gets noise.
    "digits": DenseVAE(64, 40, 5, nn.initializers.lecun_normal(), nn.initializers.zeros),
    # As published: 688,884 parameters, initialised from N(0, 0.01^2).
    "mnist": DenseVAE(784, 400, 50),
}


# 3. Loss: `bernoulli_vae_loss`, the negative ELBO of one image in nats, without a batch axis

# Draws of the latents per image. More draws reduce the variance. They cost time but no privacy.
NUM_SAMPLES = {"digits": 8, "mnist": 1}


# 4. Plan: the sampler, the clip, the noise, the number of steps and delta


def private_plan(options: argparse.Namespace, num_examples: int) -> dpoptax.Plan:
    """Returns the plan with the least noise within the budget."""
    return dpoptax.Plan.calibrate(
        num_examples=num_examples,
        expected_batch_size=options.batch_size,
        epochs=options.epochs,
        num_steps=options.steps,
        epsilon=options.epsilon,
        delta=options.delta,
        clip=options.l2_clip,
    )


def without_privacy(plan: dpoptax.Plan) -> dpoptax.Plan:
    """Returns the same plan without clipping and noise."""
    return plan.replace(clip=math.inf, noise_multiplier=0.0)


# 5. Fit: `main` below calls `dpoptax.training.fit` with both plans

# 6. Evaluate


def mean_loss(
    loss_fn: Callable[..., jax.Array], params: Any, images: np.ndarray, key: jax.Array
) -> float:
    """Returns the average loss over images, with one draw of the latents for each."""
    keys = jax.random.split(key, len(images))
    losses = jax.jit(jax.vmap(loss_fn, in_axes=(None, 0, 0)))(params, images, keys)
    return float(jnp.mean(losses))


# 7. Draw


def one_of_each(data: example_data.Data) -> np.ndarray:
    """Returns the first test image of each digit."""
    return np.stack([data.test_inputs[data.test_labels == digit][0] for digit in range(10)])


def reconstruct(model: DenseVAE, params: Any, images: np.ndarray) -> jax.Array:
    return nn.sigmoid(model.apply({"params": params}, jnp.asarray(images)))


def sample_prior(model: DenseVAE, params: Any, num_images: int, key: jax.Array) -> jax.Array:
    """Returns new images: latents from N(0, I), decoded."""
    latents = jax.random.normal(key, (num_images, model.latent))
    return nn.sigmoid(model.apply({"params": params}, latents, method="decode"))


def draw(path: Path, title: str, rows: dict[str, Any]) -> None:
    """Writes rows of images with their labels as one figure."""
    side = math.isqrt(next(iter(rows.values())).shape[1])
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.8 * columns + 1.8, 0.85 * len(rows) + 0.5), dpi=150)
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(len(rows), columns, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for (label, images), axes in zip(rows.items(), grid, strict=True):
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10, fontsize=10)
        for image, axis in zip(images, axes, strict=True):
            axis.imshow(np.reshape(image, (side, side)), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.8")
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = example_options.training_parser(DESCRIPTION, DEFAULTS)
    options = example_options.parse(parser, DEFAULTS)
    with example_options.one_line_errors():
        options.out.mkdir(parents=True, exist_ok=True)
        data = load_images(options.dataset)
        plan = private_plan(options, len(data.train_inputs))

    private_key, keys = example_options.keys(options.seed, 4)
    init_key, nonprivate_key, test_key, sample_key = keys
    model = MODELS[options.dataset]
    initial = model.init(init_key, jnp.zeros(model.pixels))["params"]
    fit = functools.partial(
        dpoptax.training.fit,
        bernoulli_vae_loss(model, num_samples=NUM_SAMPLES[options.dataset]),
        initial,
        data.train_inputs,
        optimizer=optax.adam(options.learning_rate),
        progress=not options.quiet,
    )

    print(f"Training privately: {plan.num_steps} steps", flush=True)
    private = fit(plan=plan, key=private_key)
    print("Training without privacy, for comparison", flush=True)
    nonprivate = fit(plan=without_privacy(plan), key=nonprivate_key)

    test_loss = functools.partial(
        mean_loss, bernoulli_vae_loss(model), images=data.test_inputs, key=test_key
    )
    print("\nTest loss: negative ELBO in nats per image, lower is better")
    print(f"  private      {test_loss(private.params):8.2f}")
    print(f"  not private  {test_loss(nonprivate.params):8.2f}")
    print(f"  untrained    {test_loss(initial):8.2f}\n")
    print(private.report())
    print("It covers the private model only, not the model without privacy or the test images.")
    print(example_options.key_statement(options.seed))

    images = one_of_each(data)
    path = options.out / f"vae_{options.dataset}.png"
    epsilon = dpoptax.reports.round_up(private.epsilon())
    draw(
        path,
        f"VAE of {options.dataset}, private with ε = {epsilon} at δ = {plan.delta:g}",
        {
            "test images": images,
            "private\nreconstructions": reconstruct(model, private.params, images),
            "non-private\nreconstructions": reconstruct(model, nonprivate.params, images),
            "private samples\nfrom the prior": sample_prior(model, private.params, 10, sample_key),
        },
    )
    print(f"\nThe figure is in {path}")


if __name__ == "__main__":
    main()
