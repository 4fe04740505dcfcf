"""The VAE on MNIST and Fashion-MNIST: published settings, with and without privacy, and tuned.

784-400-50-400-784, softplus, parameters from N(0, 0.01**2), Adam at 1e-3, clip 10, batches of 128,
20 epochs, noise multiplier 1.5, one draw per image, pixels drawn again each time (arXiv:2103.11648,
section 5). The tuned model has the same epsilon at the same delta.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpoptax
from dpoptax.transforms import average_params
from dpoptax.vi.models import DenseVAE, bernoulli_vae_loss
from reproduce.runs import Record, Run

# By how their runs are named.
DATASETS = {"vae": "mnist", "fashion vae": "fashion_mnist"}
NUM_EXAMPLES = 60_000
EPOCHS, BATCH = 20, 128
STEPS = EPOCHS * (NUM_EXAMPLES // BATCH)  # as d3p counts them
DELTA = 1 / NUM_EXAMPLES
# The same sum over batches drawn in other ways, which is what the paper's epsilon leaves open.
LAWS = {
    "Poisson, add or remove one": (dpoptax.samplers.Poisson, "add_or_remove_one"),
    "Poisson, replace one": (dpoptax.samplers.Poisson, "replace_one"),
    "fixed size, replace one": (dpoptax.samplers.FixedSize, "replace_one"),
}


class Setting(NamedTuple):
    """What is trained, and how; a noise multiplier of None is calibrated to the paper's epsilon."""

    model: DenseVAE
    batch: int
    num_steps: int
    learning_rate: float
    l2_clip: float
    noise_multiplier: float | None
    average_from: int
    seconds: float


SMALL = DenseVAE(784, 200, 10, nn.initializers.lecun_normal(), nn.initializers.zeros)
SETTINGS = {
    "private": Setting(DenseVAE(), BATCH, STEPS, 1e-3, 10.0, 1.5, STEPS - 1000, 300),
    "not private": Setting(DenseVAE(), BATCH, STEPS, 1e-3, math.inf, 0.0, STEPS - 1000, 250),
    "tuned": Setting(SMALL, 4096, 300, 4e-3, 1.0, None, 290, 120),
}


def plan_of(setting: Setting) -> dpoptax.Plan:
    """The plan of a setting."""
    sampler = dpoptax.samplers.Poisson(NUM_EXAMPLES, setting.batch)
    noise = setting.noise_multiplier
    if noise is None:
        noise, _ = dpoptax.accounting.calibrate_noise_multiplier(
            epsilon=plan_of(SETTINGS["private"]).epsilon(),
            delta=DELTA,
            sampler=sampler,
            num_steps=setting.num_steps,
        )
    return dpoptax.Plan(
        sampler=sampler,
        clip=setting.l2_clip,
        noise_multiplier=noise,
        num_steps=setting.num_steps,
        delta=DELTA,
    )


@functools.cache
def images(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of TensorFlow Datasets, flat, in [0, 1]."""
    import example_data

    data = example_data.mnist(dataset)
    return data.train_inputs.reshape(-1, 784), data.test_inputs.reshape(-1, 784)


def mean_test_loss(loss_fn: Any, params: Any, test: np.ndarray) -> float:
    """The negative ELBO per test image, with one draw of the latent and of the pixels each."""
    keys = jax.random.split(jax.random.key(0), len(test))
    losses = jax.jit(
        lambda rows: jax.lax.map(lambda row: loss_fn(params, *row), rows, batch_size=1000)
    )((jnp.asarray(test), keys))
    return float(jnp.mean(losses))


def train(name: str, seed: int, dataset: str = "mnist") -> Record:
    """Trains one model; returns its test loss at the end and of the averaged iterates."""
    setting = SETTINGS[name]
    plan = plan_of(setting)
    train_images, test_images = images(dataset)
    loss_fn = bernoulli_vae_loss(setting.model, redraw=True)
    params = setting.model.init(jax.random.key(seed), jnp.zeros(784))["params"]
    result = dpoptax.training.fit(
        loss_fn,
        params,
        train_images,
        plan=plan,
        optimizer=optax.chain(
            optax.adam(setting.learning_rate), average_params(start=setting.average_from)
        ),
        key=jax.random.key(seed),
        progress=False,
    )
    mean = result.averaged_params
    return {
        "epsilon": plan.epsilon() if plan.noise_multiplier else None,
        "noise_multiplier": plan.noise_multiplier,
        "test_loss": mean_test_loss(loss_fn, result.params, test_images),
        "test_loss_of_average": mean_test_loss(loss_fn, mean, test_images),
    }


def laws() -> Record:
    """Epsilon of the paper's run under each law that its batches may have had."""
    return {
        name: dpoptax.accounting.epsilon(
            sampler=make(NUM_EXAMPLES, BATCH),
            noise_multiplier=1.5,
            num_steps=STEPS,
            delta=DELTA,
            relation=relation,
        )
        for name, (make, relation) in LAWS.items()
    }


def runs(seeds: tuple[int, ...]) -> Iterator[Run]:
    """All runs of this part."""
    yield Run("vae: laws", 5, laws)
    for name, setting in SETTINGS.items():
        for seed in seeds:
            for part, dataset in DATASETS.items():
                compute = functools.partial(train, name, seed, dataset)
                yield Run(f"{part}: {name}, seed {seed}", setting.seconds, compute)
