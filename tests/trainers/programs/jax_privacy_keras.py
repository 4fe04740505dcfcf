"""Trains a Keras model by JAX Privacy's `make_private`, with its `clipped_grad` and with ours."""

import warnings

warnings.simplefilter("ignore", DeprecationWarning)

import jax_privacy  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from jax_privacy import keras_api  # noqa: E402

from dpoptax.compat.jax_privacy import clipped_grad  # noqa: E402

rng = np.random.default_rng(0)
images = rng.normal(size=(40, 6, 6, 1)).astype(np.float32)
labels = (images.mean((1, 2, 3)) > 0).astype(np.int32)
calls = []


def trained(function):
    jax_privacy.clipped_grad = function
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((6, 6, 1)),
            keras.layers.Conv2D(3, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    config = keras_api.DPKerasConfig(
        epsilon=5.0,
        delta=1e-3,
        clipping_norm=0.5,
        batch_size=8,
        gradient_accumulation_steps=1,
        train_steps=10,
        train_size=40,
        noise_multiplier=1.0,
        poisson_sampling_in_fit=True,
        microbatch_size=4,
        seed=1,
    )
    model = keras_api.make_private(model, config)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.SGD(0.5),
        metrics=["accuracy"],
    )
    history = model.fit(images, labels, batch_size=8, epochs=2, verbose=0).history
    return [np.asarray(weight) for weight in model.get_weights()], history


def ours(*args, **kwargs):
    calls.append(kwargs)
    return clipped_grad(*args, **kwargs)


(expected, history), (found, own_history) = trained(jax_privacy.clipped_grad), trained(ours)
assert calls
for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
assert history.keys() == own_history.keys()
for name, values in history.items():
    np.testing.assert_allclose(own_history[name], values, rtol=1e-4, err_msg=name)
print("same model")
