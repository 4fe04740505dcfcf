"""Keras models with a private `fit`, in an environment with Keras."""

import pytest
from pages import program_of

pytestmark = pytest.mark.trainer
REQUIREMENTS = ["keras>=3.12"]

CHECK_PAGE = """
assert model.evaluate(x[test], y[test], verbose=0)[1] > 0.85
assert set(history.history) == {"epsilon", "val_accuracy", "val_loss"}
assert len(history.history["epsilon"]) == 10
assert private.epsilon() == plan.epsilon() == history.history["epsilon"][-1] <= 4.0
assert int(model.optimizer.iterations) == plan.num_steps
"""

SETUP = """
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np

import dpoptax
import dpoptax.keras

rng = np.random.default_rng(0)
x = rng.normal(size=(40, 3)).astype("float32")
y = rng.normal(size=(40, 2)).astype("float32")
layers = keras.layers


def compiled(*others, optimizer=None, **settings):
    keras.utils.set_random_seed(0)
    first = layers.Dense(4, activation="tanh", **settings)
    model = keras.Sequential([keras.Input((3,)), first, *others, layers.Dense(2)])
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.1), loss="mse", metrics=["mae"])
    return model


def plan(clip=float("inf"), noise=0.0, steps=3, n=40):
    sampler = dpoptax.samplers.FixedSize(n, n)
    return dpoptax.Plan(
        sampler=sampler, clip=clip, noise_multiplier=noise, num_steps=steps, delta=1e-3
    )


def private_fit(model, plan, *data, key=0, **settings):
    private = dpoptax.keras.make_private(model, plan, key=jax.random.key(key))
    private.fit(*data, verbose=0, **settings)
    return private


def distance(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)
"""

# Without clip and noise, and with all examples in each batch, a private run is Keras' own.
SAME_STEPS = """
import itertools

optimizers = {
    "adam": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), clipnorm=0.1
    ),
    "average": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.5),
}
settings = dict(kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(0.9))
for name, make in optimizers.items():
    start, own, ours = (compiled(optimizer=make(), **settings) for _ in range(3))
    own.fit(x, y, batch_size=40, epochs=3, shuffle=False, verbose=0)
    private_fit(ours, plan(), x, y)
    assert distance(start, own) > 1e-2, name
    assert distance(own, ours) < 1e-5, (name, distance(own, ours))
    for a, b in zip(own.optimizer.variables, ours.optimizer.variables, strict=True):
        assert np.allclose(a.value, b.value, atol=1e-5), (name, a.path)

# Two inputs, two outputs with losses of their own, a table lookup and a frozen layer.
def functional():
    keras.utils.set_random_seed(0)
    number, word = keras.Input((3,), name="number"), keras.Input((2,), name="word", dtype="int32")
    found = layers.Flatten()(layers.Embedding(5, 4)(word))
    frozen = layers.Dense(4, trainable=False)
    hidden = layers.LayerNormalization()(layers.concatenate([frozen(number), found]))
    model = keras.Model(
        {"number": number, "word": word},
        {"a": layers.Dense(2, name="a")(hidden), "b": layers.Dense(3, name="b")(hidden)},
    )
    losses = {"a": "mse", "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model.compile(keras.optimizers.SGD(0.1), loss=losses, loss_weights={"a": 1.0, "b": 0.5})
    return model


inputs = {"number": x, "word": rng.integers(0, 5, size=(40, 2))}
targets = {"a": y, "b": rng.integers(0, 3, size=40)}
start, own, ours = (functional() for _ in range(3))
own.fit(inputs, targets, batch_size=40, epochs=3, shuffle=False, verbose=0)
private_fit(ours, plan(), inputs, targets)
assert distance(start, own) > 1e-2 and distance(own, ours) < 1e-5

# A list of inputs, and a loss of the model's own.
class Own(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.abs(y - y_pred))


def listed():
    keras.utils.set_random_seed(0)
    parts = [keras.Input((3,)), keras.Input((2,))]
    model = Own(parts, layers.Dense(1)(layers.concatenate(parts)))
    model.compile(keras.optimizers.SGD(0.1))
    return model


start, own, ours = (listed() for _ in range(3))
own.fit([x, y], x[:, :1], batch_size=40, epochs=3, shuffle=False, verbose=0)
private_fit(ours, plan(), [x, y], x[:, :1], validation_data=([x, y], x[:, :1], y[:, 0] ** 2))
assert distance(start, own) > 1e-2 and distance(own, ours) < 1e-5
"""

# Clip and noise are those of the plan, and each example has numbers of its own.
PRIVATE_STEPS = """
start, clipped = compiled(), compiled()
outlier = x.copy()
outlier[0] *= 1e6
private_fit(clipped, plan(clip=0.01, steps=1), outlier, 1e6 + 0 * y)
squares = [np.sum((a - b) ** 2) for a, b in zip(start.get_weights(), clipped.get_weights())]
assert 0.5 * 0.1 * 0.01 < np.sqrt(sum(squares)) <= 0.1 * 0.01 * 1.04, np.sqrt(sum(squares))

noisy = [compiled(optimizer=keras.optimizers.SGD(1.0)) for _ in range(2)]
for number, model in enumerate(noisy):
    private_fit(model, plan(clip=4.0, noise=10.0, steps=1), x, y, key=number)
noise = np.concatenate([w.ravel() for w in (noisy[0].get_weights() + noisy[1].get_weights())])
start = np.concatenate([w.ravel() for w in 2 * compiled().get_weights()])
# 52 numbers; the standard error is a tenth. The gradients move the sum by less than the clip.
assert 0.7 < np.std(noise - start) < 1.3, np.std(noise - start)
assert distance(*noisy) > 0.5

# A loss that reveals which units were dropped: with one mask for all, the sum would be 0 or 40.
class Unit(keras.layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.w * x


def fraction(model, y_pred):
    return y_pred[:, :1]


model = keras.Sequential([keras.Input((1,)), Unit(), layers.Dropout(0.5)])
model.compile(keras.optimizers.SGD(1.0), loss=lambda y, y_pred: keras.ops.mean(y_pred))
means = []
for number in range(2):
    before = model.get_weights()[0]
    private_fit(model, plan(steps=1), np.ones((40, 1)), np.ones((40, 1)), key=number)
    means.append(float(before - model.get_weights()[0]) / 2)
# The mean of 40 coins is within 4 standard errors of a half, and differs from step to step.
assert all(0.18 < mean < 0.82 for mean in means) and means[0] != means[1], means
"""

# A run that a callback ended continues where it was, and counts all steps.
RESUMED = """
import sys


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == 1


def fit(folder, *callbacks):
    keras.utils.clear_session()  # layers get the same names again
    model = compiled(layers.Dropout(0.5), optimizer=keras.optimizers.Adam(0.1))
    settings = dict(key=jax.random.key(7), resume=folder)
    sampler = dpoptax.samplers.Poisson(40, 10)
    made = dpoptax.Plan(sampler=sampler, clip=1.0, noise_multiplier=1.0, num_steps=6, delta=1e-3)
    private = dpoptax.keras.make_private(model, made, **settings)
    private.fit(x, y, verbose=0, callbacks=callbacks, validation_data=(x, y))
    return private


whole = fit(sys.argv[1] + "/once")
first = fit(sys.argv[1] + "/twice", Stop())
assert int(first.model.optimizer.iterations) == 2 and first.epsilon() == first.plan.epsilon(2)
second = fit(sys.argv[1] + "/twice")
assert second.epsilon() == whole.epsilon() == whole.plan.epsilon()
assert distance(whole.model, second.model) == 0.0 < distance(whole.model, first.model)
"""

REFUSALS = """
def refused(message, function, kind=ValueError):
    try:
        function()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def make(model):
    return lambda: dpoptax.keras.make_private(model, plan())


def fit(*others, **settings):
    return lambda: private_fit(compiled(*others), plan(), x, y, **settings)


sgd = keras.optimizers.SGD
refused("changes sequential", fit(layers.BatchNormalization()))
frozen = layers.BatchNormalization()
frozen.trainable = False
fit(frozen)()
for name, remedy in {
    "batch_size": "sampler of the plan", "epochs": "num_steps", "shuffle": "sampler of the plan",
    "validation_split": "validation_data", "sample_weight": "part of y", "unknown": "Leave it out",
}.items():
    refused(f"got {name}. ", fit(**{name: 1}), TypeError)
    refused(remedy, fit(**{name: 1}), TypeError)
averaging = compiled(optimizer=sgd(0.1, gradient_accumulation_steps=2))
refused("averages gradients over steps", make(averaging))
scaling = compiled(optimizer=keras.optimizers.LossScaleOptimizer(sgd(0.1)))
refused("loss scaling", make(scaling))
refused("loss scaling", make(compiled(optimizer=sgd(0.1, loss_scale_factor=8.0))))
refused("expected a compiled model", make(keras.Sequential([layers.Dense(2)])))
refused("must be a keras.Model", make(layers.Dense(2)), TypeError)


class OwnStep(keras.Model):
    def train_step(self, state, data):
        return super().train_step(state, data)


given = keras.Input((3,))
own = OwnStep(given, layers.Dense(2)(given))
own.compile("sgd", "mse")
refused("got OwnStep", make(own))


class Unused(layers.Layer):
    def build(self, shape):
        self.extra = self.add_weight(shape=(2,), name="extra")

    def call(self, x):
        return x


refused("unused/extra", fit(Unused()))
refused("40", lambda: private_fit(compiled(), plan(), x[:30], y[:30]))
batches = ((x[:4], y[:4]) for _ in range(3))
refused("yields batches", lambda: private_fit(compiled(), plan(), batches), TypeError)


class Slower(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.01


class Frozen(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.layers[0].kernel.assign(0 * self.model.layers[0].kernel)


class Looks(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.evaluate(x, y, verbose=0)
        self.model.predict(x, verbose=0)


refused("learning_rate", fit(callbacks=[Slower()]))
refused("kernel", fit(callbacks=[Frozen()]))
fit(callbacks=[Looks()])()

private = private_fit(compiled(), plan(), x, y)
refused("one call of fit", lambda: private.fit(x, y))
refused("private.model.predict", lambda: private.predict(x), AttributeError)
refused("call of fit before", lambda: dpoptax.keras.make_private(compiled(), plan()).report())
assert "PrivateModel" in repr(private)
"""

PROGRAMS = {
    "same steps": SETUP + SAME_STEPS,
    "private steps": SETUP + PRIVATE_STEPS,
    "resumed": SETUP + RESUMED,
    "refusals": SETUP + REFUSALS,
}


def test_the_programs_of_the_page_train_privately(run_program):
    run_program(REQUIREMENTS, program_of("keras") + CHECK_PAGE)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_private_fit(run_program, name, tmp_path):
    run_program(REQUIREMENTS, PROGRAMS[name], str(tmp_path))
