"""What a page takes for given: the data, the loss and the plan of its reader, as small as possible.

Each function returns the names that its page does not define. It may also write the files that the
page reads: it is called in the folder where the page runs.
"""

import pathlib
import types

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import dpoptax
from dpoptax.vi.models import DenseVAE, bernoulli_vae_loss

N = 200
LIBRARIES = {"dpoptax": dpoptax, "jax": jax, "jnp": jnp, "np": np, "optax": optax}


def small_plan(num_examples=N, num_steps=4):
    return dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(num_examples, 50), clip=1.0, noise_multiplier=1.0,
        num_steps=num_steps, delta=1e-3,
    )  # fmt: skip


def distance_to(params, example):
    return jnp.sum((params - example) ** 2)


def mean():
    """The mean of some vectors, in a few steps."""
    data = jax.random.normal(jax.random.key(0), (N, 4))
    return LIBRARIES | {
        "data": data,
        "params": jnp.zeros(4),
        "loss_fn": distance_to,
        "plan": small_plan(),
        "optimizer": optax.sgd(0.1),
        "key": jax.random.key(1),
    }


def correlated_noise():
    data = jax.random.normal(jax.random.key(0), (60_000, 2))
    return mean() | {"data": data, "params": jnp.zeros(2)}


def scaling():
    """Also parameters in two parts, and images in two kinds of files."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    images = np.random.default_rng(0).random((N, 4), np.float32)
    np.save("images.npy", images)
    writer = ArrayRecordWriter("images.array_record", "group_size:1")
    for image in images:
        writer.write(image.tobytes())
    writer.close()

    def loss_fn(params, example):
        """Takes examples with a label or without."""
        image = example[0] if isinstance(example, tuple) else example
        return distance_to(params["backbone"] + params["head"], image)

    return mean() | {
        "params": {"backbone": jnp.zeros(4), "head": jnp.zeros(4)},
        "backbone": jnp.zeros(4),
        "data": jnp.asarray(images),
        "loss_fn": loss_fn,
        "labels": np.zeros(N, np.int32),
        "parse": lambda record: np.frombuffer(record, np.float32),
        "validation_accuracy": lambda params: 0.5,
        "grain": grain,
    }


def is_it_private():
    """The digits and the VAE of `examples/05_vae.py`, and a classifier's canaries."""
    from sklearn.datasets import load_digits

    images = jnp.asarray(load_digits(return_X_y=True)[0][:1437], jnp.float32) / 16
    model = DenseVAE(64, 40, 5, nn.initializers.lecun_normal(), nn.initializers.zeros)
    params = model.init(jax.random.key(0), images[0])["params"]
    return LIBRARIES | {
        "pathlib": pathlib,
        "images": images,
        "loss_fn": bernoulli_vae_loss(model, num_samples=8),
        "params": params,
        "public_images": images[:4],
        "public_labels": jnp.arange(4),
        "in_scores": np.linspace(0, 1, 20),
        "out_scores": np.linspace(-1, 0, 20),
    }


def adoption():
    """Inputs with labels, as one pair of columns and as batches for the loops before."""
    import equinox

    num_examples = 1000
    x = jax.random.normal(jax.random.key(0), (num_examples, 4))
    y = (x[:, 0] > 0).astype(jnp.int32)
    return mean() | {
        "TrainState": TrainState,
        "accuracy": lambda params: 0.5,
        "batches": [(x[:50], y[:50]), (x[50:100], y[50:100])],
        "data": (x, y),
        "eqx": equinox,
        "flax": flax,
        "loss_fn": lambda params, example: distance_to(params, example[0]),
        "nn": nn,
        "nnx": nnx,
        "num_examples": num_examples,
        "tx": optax.chain(small_plan().privatize(jax.random.key(0)), optax.adam(1e-3)),
    }


def lora():
    """A model with two blocks of a query and a value matrix."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.query, self.value = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return x + jnp.tanh(self.query(x)) * self.value(x)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def loss(model, example):
        return optax.softmax_cross_entropy_with_integer_labels(model(example[0]), example[1])

    rngs = nnx.Rngs(0)
    given = {"nnx": nnx, "rngs": rngs, "loss": loss, "model": Model(rngs)}
    return mean() | given | {"data": tuple(column[:N] for column in adoption()["data"])}


def large_models():
    """A decoder of one matrix per layer, on eight devices."""
    from jax.sharding import NamedSharding, PartitionSpec

    width, vocabulary = 8, 16
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = {"table": jnp.ones((vocabulary, width)), "layers": jnp.ones((2, width, width))}
    plan = small_plan()
    tx = optax.chain(plan.privatize(jax.random.key(0)), optax.adam(1e-3))
    return LIBRARIES | {
        "layer": lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None),
        "params": params,
        "shardings": {
            "table": NamedSharding(mesh, PartitionSpec(None, "model")),
            "layers": NamedSharding(mesh, PartitionSpec(None, None, "model")),
        },
        "tokens": jnp.arange(8 * 6).reshape(8, 6) % vocabulary,
        "tx": tx,
        "NamedSharding": NamedSharding,
        "P": PartitionSpec,
    }


SETUPS: dict[str, types.FunctionType] = {
    "docs/adoption.md": adoption,
    "docs/correlated_noise.md": correlated_noise,
    "docs/is_it_private.md": is_it_private,
    "docs/large_models.md": large_models,
    "docs/scaling.md": scaling,
    "docs/trainers/lora.md": lora,
}

# What takes long on a page, with fewer steps.
SMALLER = {
    "docs/adoption.md": {"epochs=20": "epochs=2"},
    "docs/is_it_private.md": {
        "num_canaries = 1000": "num_canaries = 200",
        "num_runs=1000": "num_runs=40",
        "epochs=2,": "epochs=1,",
        "expected_batch_size=50,": "expected_batch_size=500,",
        "confidence=0.99": "confidence=0.6",
        # At 95 %, the command fails for one of twenty correct runs.
        "dpoptax audit audit.json": "dpoptax audit audit.json --confidence 0.9999",
    },
}


def smaller(page, text):
    """Returns the text of a page with fewer steps."""
    for old, new in SMALLER.get(page, {}).items():
        assert old in text, f"{page} has no {old}"
        text = text.replace(old, new)
    return text
