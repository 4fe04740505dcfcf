"""Test accuracy of MNIST with small batches: correlated against independent noise.

    TFDS_DATA_DIR=FOLDER python -m benchmarks.correlated --seeds 5
    TFDS_DATA_DIR=FOLDER python -m benchmarks.correlated --held-out --rates 1 2 3 4 6 8 12 --seeds 1

The second line is how the learning rates were chosen: on the last 10,000 training images, for each
kind of noise, by one seed. The privacy of this choice is not counted.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpoptax
from dpoptax.mechanisms import Correlated

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import example_data

HIDDEN = 64
CLIP = 1.0
# The best ones on held out images.
RATES = {"independent": 4.0, "correlated": 4.0}


def initial_params(key: jax.Array) -> dict[str, jax.Array]:
    """A network with one hidden layer of tanh."""
    first, second = jax.random.split(key)
    return {
        "a": jax.random.normal(first, (196, HIDDEN)) / 14,
        "c": jnp.zeros(HIDDEN),
        "b": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
        "d": jnp.zeros(10),
    }


def logits(params: Any, image: jax.Array) -> jax.Array:
    """The logits of an image, or of several."""
    return jnp.tanh((2 * image - 1) @ params["a"] + params["c"]) @ params["b"] + params["d"]


def loss_fn(params: Any, example: Any) -> jax.Array:
    """The loss of one image."""
    image, label = example
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


def halved(images: np.ndarray) -> np.ndarray:
    """Means of two by two pixels, `(images, 196)`."""
    means = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    return means.reshape(-1, 196).astype(np.float32)


def train(plan: dpoptax.Plan, rate: float, seed: int, data: example_data.Data) -> float:
    """Trains with plain SGD, and returns the test accuracy in percent."""
    key = jax.random.key(seed)
    result = dpoptax.training.fit(
        loss_fn,
        initial_params(key),
        (data.train_inputs, data.train_labels),
        plan=plan,
        optimizer=optax.sgd(rate),
        key=key,
        progress=False,
    )
    found = jnp.argmax(logits(result.params, data.test_inputs), axis=-1)
    return 100 * float(jnp.mean(found == data.test_labels))


def main() -> None:
    """Trains each kind of noise with several seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--batch", type=float, default=256)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", help="of SGD [the chosen ones]")
    parser.add_argument("--held-out", action="store_true", help="test on training images")
    options = parser.parse_args()
    data = example_data.mnist()
    data = data._replace(
        train_inputs=halved(data.train_inputs), test_inputs=halved(data.test_inputs)
    )
    if options.held_out:
        inputs, labels = data.train_inputs, data.train_labels
        data = example_data.Data(
            inputs[:-10_000], labels[:-10_000], inputs[-10_000:], labels[-10_000:]
        )
    settings = {
        "num_examples": len(data.train_labels),
        "expected_batch_size": options.batch,
        "clip": CLIP,
        "epochs": options.epochs,
        "epsilon": options.epsilon,
        "delta": 1e-5,
    }
    plans = {
        "independent": dpoptax.Plan.calibrate(**settings),
        "correlated": dpoptax.correlated_plan(**settings),
    }
    for kind, plan in plans.items():
        mechanism = plan.mechanism
        bands = mechanism.strategy.num_bands if isinstance(mechanism, Correlated) else 1
        print(f"{kind}: {plan.num_steps:,} steps, noise multiplier {plan.noise_multiplier:.3f}, "
              f"{bands} bands, epsilon {plan.epsilon():.3f}")  # fmt: skip
        for rate in options.rates or [RATES[kind]]:
            found = [train(plan, rate, seed, data) for seed in range(options.seeds)]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"  rate {rate:g}: {np.mean(found):.2f} +- {spread:.2f}  {np.round(found, 2)}")


if __name__ == "__main__":
    main()
