"""The same models and steps in torch: without privacy, and by Opacus in two ways.

Parameter counts equal those of the JAX models, except for the LSTM: its layer in torch has a second
bias, which adds 400 parameters. The data are synthetic.
"""

import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.peers.step import CLIP, NOISE, RATE, Step


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


class Pixels(nn.Module):
    """The mean over an image."""

    def forward(self, x):
        return x.mean((2, 3))


class Embedding(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(10_004, 16), Mean(), nn.Linear(16, 2))


class Lstm(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.embed, self.layer = nn.Embedding(10_004, 100), layer(100, 100, batch_first=True)
        self.out = nn.Linear(100, 2)

    def forward(self, ids):
        return self.out(self.layer(self.embed(ids))[0].mean(1))


class Adapted(nn.Module):
    """A frozen layer plus a layer of rank 8."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(128, 128)
        self.low, self.high = nn.Linear(128, 8, bias=False), nn.Linear(8, 128, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.high(self.low(x))


class Block(nn.Module):
    """Attention and two dense layers, by modules that Opacus knows."""

    def __init__(self, adapted=False):
        super().__init__()
        kind = Adapted if adapted else lambda: nn.Linear(128, 128)
        self.norm1, self.norm2 = nn.LayerNorm(128), nn.LayerNorm(128)
        self.query, self.key = kind(), nn.Linear(128, 128)
        self.value, self.out = kind(), nn.Linear(128, 128)
        self.wide, self.narrow = nn.Linear(128, 512), nn.Linear(512, 128)

    def forward(self, x):
        y = self.norm1(x)
        heads = [
            layer(y).unflatten(-1, (4, 32)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        wide = nn.functional.gelu(self.wide(self.norm2(x)), approximate="tanh")  # as in Flax
        return x + self.narrow(wide)


class Transformer(nn.Module):
    def __init__(self, adapted=False):
        super().__init__()
        self.embed, self.positions = nn.Embedding(5_000, 128), nn.Embedding(128, 128)
        self.blocks = nn.Sequential(Block(adapted), Block(adapted))
        self.norm, self.out = nn.LayerNorm(128), nn.Linear(128, 2)
        if adapted:
            for name, leaf in self.named_parameters():
                trained = any(part in name for part in (".low.", ".high."))
                leaf.requires_grad_(trained or name.startswith("out."))

    def forward(self, ids):
        place = torch.arange(128, device=ids.device).repeat(len(ids), 1)
        x = self.blocks(self.embed(ids) + self.positions(place))
        return self.out(self.norm(x).mean(1))


class Vae(nn.Module):
    """Returns the logits of the pixels and the divergence."""

    def __init__(self):
        super().__init__()
        self.hidden, self.loc = nn.Linear(784, 400), nn.Linear(400, 50)
        self.scale, self.decode = nn.Linear(400, 50), nn.Linear(50, 400)
        self.out = nn.Linear(400, 784)

    def forward(self, x):
        hidden = nn.functional.softplus(self.hidden(x))
        loc, log_scale = self.loc(hidden), self.scale(hidden)
        z = loc + torch.exp(log_scale) * torch.randn_like(loc)
        logits = self.out(nn.functional.softplus(self.decode(z)))
        kl = 0.5 * (torch.exp(2 * log_scale) + loc**2 - 1) - log_scale
        return torch.cat([logits, kl.sum(1, keepdim=True)], dim=1)


class PerExample(nn.Module):
    """A loss of a batch, or of every example, as Opacus asks for."""

    def __init__(self, function):
        super().__init__()
        self.function, self.reduction = function, "mean"

    def forward(self, outputs, targets):
        losses = self.function(outputs, targets)
        return losses.mean() if self.reduction == "mean" else losses


def elbo(outputs, x):
    """Per example, summed over pixels."""
    logits, kl = outputs[:, :-1], outputs[:, -1]
    pixels = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return pixels.sum(1) + kl


def binary(outputs, y):
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="none")


def classes(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def cifar():
    layers, before = [], 3
    for features in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(before, features, 3, padding=1), nn.ReLU()]
            before = features
        layers.append(nn.AvgPool2d(2))
    layers += [nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 10, 3, padding=1)]
    return nn.Sequential(*layers, Pixels())


def mnist():
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def lstm(private: bool):
    if not private:
        return Lstm(nn.LSTM)
    from opacus.layers import DPLSTM

    return Lstm(DPLSTM)


# Model, shape of an example, vocabulary, loss, classes.
MODELS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...], int | None, Any, int]] = {
    "logistic": (lambda _: nn.Linear(104, 1), (104,), None, binary, 1),
    "fcnn": (
        lambda _: nn.Sequential(nn.Linear(104, 50), nn.ReLU(), nn.Linear(50, 2)),
        (104,), None, classes, 2,
    ),
    "vae": (lambda _: Vae(), (784,), None, elbo, 0),
    "mnist": (lambda _: mnist(), (1, 28, 28), None, classes, 10),
    "embedding": (lambda _: Embedding(), (256,), 10_004, classes, 2),
    "cifar": (lambda _: cifar(), (3, 32, 32), None, classes, 10),
    "lstm": (lstm, (256,), 10_004, classes, 2),
    "transformer": (lambda _: Transformer(), (128,), 5_000, classes, 2),
    "lora": (lambda _: Transformer(adapted=True), (128,), 5_000, classes, 2),
}  # fmt: skip


def batch_of(name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    _, shape, vocabulary, _, count = MODELS[name]
    if vocabulary is None:
        x = torch.rand(batch, *shape)
    else:
        x = torch.randint(0, vocabulary, (batch, *shape))
    if count == 0:
        return x, x
    return x, torch.rand(batch).round() if count == 1 else torch.randint(0, count, (batch,))


def maker(peer: str) -> Callable[[str, int], Step]:
    """See `worker.maker`."""
    private = peer != "torch"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make(name: str, batch: int) -> Step:
        torch.manual_seed(0)
        build, _, _, function, _ = MODELS[name]
        model, criterion = build(private).to(device), PerExample(function)
        trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
        parameters = sum(leaf.numel() for leaf in trained)
        optimizer = torch.optim.SGD(trained, lr=RATE)
        if private:
            model, optimizer, criterion = opacus(peer, model, optimizer, criterion, batch)
        x, y = (tensor.to(device) for tensor in batch_of(name, batch))

        def run(steps: int) -> None:
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                criterion(model(x), y).backward()
                optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        run(1)
        first = time.perf_counter() - began
        began = time.perf_counter()
        run(1)
        seconds = max(first - (time.perf_counter() - began), 0.0)
        mib = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
        return Step(run, parameters, seconds, mib)

    return make


def opacus(peer: str, model: Any, optimizer: Any, criterion: Any, batch: int) -> tuple[Any, ...]:
    """The three of them as Opacus has them; every step is one of a whole batch."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import (
        DPOptimizerFastGradientClipping,
    )
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    settings = {
        "noise_multiplier": NOISE,
        "max_grad_norm": CLIP,
        "expected_batch_size": batch,
        "loss_reduction": "mean",
    }
    if peer == "opacus_hooks":
        return GradSampleModule(model), DPOptimizer(optimizer, **settings), criterion
    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
    )
    private = DPOptimizerFastGradientClipping(optimizer, **settings)
    return wrapped, private, DPLossFastGradientClipping(wrapped, private, criterion)


def versions() -> dict[str, str]:
    """Of what matters, and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {name: importlib.metadata.version(name) for name in ("torch", "opacus")}
    return found | {"device": device, "threads": str(torch.get_num_threads())}
