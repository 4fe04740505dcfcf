"""A convolutional network in NNX, trained with differential privacy, in a run that can resume.

NNX keeps parameters inside the model. `dpoptax.nnx.loss_fn` takes them out for training, and makes
a loss of one example. `nnx.update` puts the trained ones back. The activations are tanh, because
bounded activations lose less under clipping than ReLU (Papernot et al. 2021, arXiv:2007.14191).

    python examples/03_mnist_cnn.py                      # scikit-learn's digits, a minute
    python examples/03_mnist_cnn.py --dataset mnist      # MNIST through TensorFlow Datasets, longer
    python examples/03_mnist_cnn.py --resume run         # continues a stopped run
    python examples/03_mnist_cnn.py --help

It prints the test accuracy of the private model and of an untrained one, and the privacy statement.
It draws the test images with the least certain predictions. It needs matplotlib and scikit-learn:
pip install 'dpoptax[examples]'.
"""

from pathlib import Path

import example_data
import example_options
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

import dpoptax

DESCRIPTION = (
    "Trains a convolutional network with differential privacy. The digits take about a minute, "
    "MNIST about ten minutes on two cores."
)

DEFAULTS = {
    "digits": example_options.Defaults(
        epochs=40, batch_size=256, epsilon=3.0, delta=1e-4, l2_clip=0.5, learning_rate=0.5
    ),
    "mnist": example_options.Defaults(
        epochs=20, batch_size=2048, epsilon=2.93, delta=1e-5, l2_clip=0.1, learning_rate=2.0
    ),
}
LOADERS = {"digits": example_data.digits, "mnist": example_data.mnist}


# 1. Model: as in the TensorFlow Privacy tutorial, 26,010 parameters for 28 x 28 pixels


def pooled(image: jax.Array) -> jax.Array:
    """`nnx.max_pool(image, (2, 2), strides=(1, 1))`, whose gradient is slow on a CPU."""
    image = jnp.maximum(image[..., 1:, :, :], image[..., :-1, :, :])
    return jnp.maximum(image[..., 1:, :], image[..., :-1, :])


class Cnn(nnx.Module):
    """Two convolutions and two dense layers, for one image or several."""

    def __init__(self, side: int, rngs: nnx.Rngs) -> None:
        """Makes the layers for images of `side` x `side` pixels."""
        first, second = ((8, 2), (4, 2)) if side >= 28 else ((3, 1), (3, 2))
        self.conv1 = nnx.Conv(1, 16, (first[0],) * 2, strides=first[1], rngs=rngs)
        self.conv2 = nnx.Conv(
            16, 32, (second[0],) * 2, strides=second[1], padding="VALID", rngs=rngs
        )
        flat = jax.eval_shape(self.features, jnp.zeros((side, side, 1))).shape[-1]
        self.dense1 = nnx.Linear(flat, 32, rngs=rngs)
        self.dense2 = nnx.Linear(32, 10, rngs=rngs)

    def features(self, image: jax.Array) -> jax.Array:
        """Returns the output of the convolutions as a vector."""
        image = pooled(jnp.tanh(self.conv1(image)))
        image = pooled(jnp.tanh(self.conv2(image)))
        return image.reshape(*image.shape[:-3], -1)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Returns one logit for each digit."""
        return self.dense2(jnp.tanh(self.dense1(self.features(image))))


# 2. Evaluate and draw


def predict(model: Cnn, images: np.ndarray) -> np.ndarray:
    """Returns the probability of each digit, for each image."""
    return np.asarray(nnx.softmax(nnx.jit(lambda model, rows: model(rows))(model, images)))


def draw(path: Path, title: str, images: np.ndarray, chances: np.ndarray) -> None:
    """Writes a figure of images, each with the prediction and its probability."""
    figure = Figure(figsize=(9, 3.9), dpi=150)
    figure.suptitle(title, fontsize=12)
    for image, chance, axis in zip(images, chances, figure.subplots(2, 8).flat, strict=True):
        axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{chance.argmax()}, {100 * chance.max():.0f} %", fontsize=9)
        axis.spines[:].set_color("0.8")
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = example_options.training_parser(DESCRIPTION, DEFAULTS)
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="folder that keeps the run")
    options = example_options.parse(parser, DEFAULTS)
    with example_options.one_line_errors():
        options.out.mkdir(parents=True, exist_ok=True)
        data = LOADERS[options.dataset]()
        train, test = data.train_inputs[..., None], data.test_inputs[..., None]
        plan = dpoptax.Plan.calibrate(
            num_examples=len(train),
            expected_batch_size=options.batch_size,
            epochs=options.epochs,
            num_steps=options.steps,
            epsilon=options.epsilon,
            delta=options.delta,
            clip=options.l2_clip,
        )

        def loss_of(model: Cnn, example: tuple[jax.Array, jax.Array]) -> jax.Array:
            image, digit = example
            return optax.softmax_cross_entropy_with_integer_labels(model(image), digit)

        model = Cnn(train.shape[1], nnx.Rngs(0))
        loss_fn, initial = dpoptax.nnx.loss_fn(model, loss_of)

        print(f"Training privately: {plan.num_steps} steps", flush=True)
        result = dpoptax.training.fit(
            loss_fn,
            initial,
            (train, data.train_labels),
            plan=plan,
            optimizer=optax.sgd(options.learning_rate, momentum=0.9),
            key=None if options.seed is None else dpoptax.random.insecure_key(options.seed),
            progress=not options.quiet,
            resume=options.resume,
        )

    print(f"\nTest accuracy on {len(test)} images, in percent")
    untrained = predict(model, test)
    nnx.update(model, result.params)
    chances = predict(model, test)
    for name, found in (("private", chances), ("untrained", untrained)):
        print(f"  {name:<11}{100 * np.mean(found.argmax(axis=1) == data.test_labels):8.2f}")
    print(f"\n{result.report()}")

    path = options.out / f"cnn_{options.dataset}.png"
    unsure = np.argsort(chances.max(axis=1))[:16]
    epsilon = dpoptax.reports.round_up(result.epsilon())
    title = f"least certain predictions, private with ε = {epsilon} at δ = {plan.delta:g}"
    draw(path, title, test[unsure], chances[unsure])
    print(f"\nThe figure is in {path}")


if __name__ == "__main__":
    main()
