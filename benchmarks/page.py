"""Writes the benchmark page, with tables and figures, from stored measurements."""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks import pictures, quick, results, scale
from benchmarks.models import PARAMETER_COUNTS
from benchmarks.peers.environments import PEERS, PLAIN

HEADER = """# Benchmarks

`python -m benchmarks` writes this page. The measurements are in [{folder}]({folder}), one folder
per device. `make bench` repeats all of them into `out/benchmarks`, and continues after an
interruption. `python -m benchmarks.compare OLD NEW` shows what became slower.

In each round, all programs run one after the other. Numbers are medians over rounds, and ± is half
the distance between the quartiles. The machines share their cores with other users, so read the
ratios, which are computed within each round.
"""
CPU_ALONE = """
So far there are measurements on a CPU only. We make no claim about GPUs.
"""
SIDE = """
### A training step, side by side

Milliseconds per step: gradients of the batch, clipping to norm 1, noise with multiplier 1.1, and
SGD. The number in brackets is the ratio to the step without privacy in the same framework. **Bold**
marks the fastest private step, and all steps within its spread. There are nine rounds, or fewer for
slow steps: each system is measured for 20 seconds. A time without ± was measured once.

Models and parameter counts are those of [arXiv:2010.09063](https://arxiv.org/abs/2010.09063), and
for the VAE those of [arXiv:2103.11648](https://arxiv.org/abs/2103.11648). The transformer has two
blocks. In "lora" it is frozen, and adapters of rank 8 and a new head are trained. Each system runs
in its own process; JAX Privacy and Opacus have their own environments. JAX programs are compiled,
torch programs are not. The LSTM of torch has a second bias, which adds 400 parameters.

- Batches are full. "Epochs of the VAE" shows what sampling adds.
- A ratio below 1 is not an error. The step without privacy is `jax.grad` of the mean loss, with
  XLA's own gradients of convolutions and products. A model that is written for batches gives the
  same program. The factored form computes these gradients in another way, which is sometimes faster
  on a CPU. Batches with large activations are computed in parts that stay in the cache, which is
  faster. A step without privacy could do the same.
- JAX Privacy and `vmap` store a gradient per example. JAX Privacy sums them along their first axis,
  which XLA does slowly on a CPU if they are large (embedding, vae). "JAX by vmap" sums them by a
  product.
- JAX Privacy at batches of 512 and 1,024 was measured separately, apart from lora. The times of
  cifar, and those above ten seconds, are of 2026-11-22.
- d3p, TF Privacy, BackPACK and PyVacy were not measured here. Published numbers are further below.
"""
STARTING = """
At batch 128: how many seconds longer the first step takes than a later one (in JAX, tracing and
compiling), and temporary memory in MiB as the compiler reports it, or the peak memory of the
device.
"""
EPOCHS = """
Seconds per epoch at batch 128: the step above, times the number of steps per epoch. The number in
brackets is for the first epoch, with tracing and compiling. The published numbers are from a Titan
V in 2020 at batch 128 (arXiv:2010.09063, Table 1): the faster of that paper's JAX and its new TF
Privacy / the best other private system of TF Privacy, Opacus, BackPACK and PyVacy / the best
without privacy. For the VAE they are from a V100 in 2021 (arXiv:2103.11648, Table 2): d3p / d3p
without privacy.
"""
PUBLISHED = {
    "logistic": (45_222, "0.23", "0.48", "0.12"),
    "fcnn": (45_222, "0.21", "0.77", "0.20"),
    "mnist": (60_000, "0.53", "6.5", "0.42"),
    "cifar": (50_000, "7.3", "12", "1.7"),
    "embedding": (25_000, "0.23", "3.8", "0.11"),
    "lstm": (25_000, "8.2", "407", "3.6"),
    "vae": (60_000, "0.56", "", "0.34"),
}
ABLATION = """
### The effect of vmap, jit and factored gradients

Milliseconds for a clipped sum of gradients, without noise. Published seconds per epoch on a Titan V
(arXiv:2010.09063, Table 2), for neither, vmap, jit and both: logistic 1040, 16.4, 1.08, 0.231; fcnn
1240, 19.2, 2.85, 0.239; mnist 1530, 24.6, 22.3, 0.535; cifar 3840, 64.8, 84.0, 7.28; embedding 856,
14.4, 3.80, 0.231.
"""
LAYERS = """
### One layer of each kind

Milliseconds, and MiB of temporary memory, at batch 128 without noise and optimizer: the mean
gradient without privacy, the clipped sum of factored gradients (the default), and the clipped sum
of stacked gradients (`vmap` of `grad`). The number in brackets is the ratio to the first.
"""
GROWTH = """
### Scaling

The same measurement as one size grows: the width of a dense network, the sequence length in a
transformer block, and the batch size of the VAE.
"""
LARGEST = """
### The largest batch in 12 GiB

The compiler reports the memory of a training step; nothing is run. The search is accurate to one
sixteenth. Published for a GPU with 12 GB (arXiv:2010.09063, Table 4; JAX, private JAX, Opacus):
mnist 187,136, 116,480, 36,608; cifar 10,448, 4,264, 1,920; lstm 11,984, 2,487, 10.
"""
SCALE = """
### Language models

Plain and private steps of a decoder with scanned layers under `jax.checkpoint`, in bfloat16, and of
adapters. `benchmarks/scale.py` has the sizes. Rows with "compiled" run nothing: XLA reports the
memory, and arithmetic and communication are counted in its program, with loops multiplied out.
"""
DEFAULTS = """
### What the defaults cost

Milliseconds per step for users who change nothing: `training.fit` with Poisson batches and their
padding, a secure key and Adam. "Private" is `dp_sgd` with JAX's default keys, on full batches that
are given. "Not private" is a loop over full batches with Adam, in Python or on the device: the
faster of the two. Compilation is left out. `make bench-quick` repeats it in about twelve minutes.
"""
OTHERS = {
    "devices": (
        "A step on several virtual devices",
        "A private step of the VAE at batch 256. The devices share the cores of one machine.",
    ),
    "epoch": (
        "Epochs of the VAE",
        "60,000 examples, with Adam. Private: padded Poisson batches. Private, fixed size: batches "
        "of exactly this size. Same batches: Poisson batches without clipping and noise. Not "
        "private: "
        "batches of exactly this size without clipping and noise. The last two do not depend on "
        "the type of key; where they differ, the machine was busier.",
    ),
    "samplers": (
        "Drawing a batch of 128",
        "By number of examples, next to functions of `jax.random`.",
    ),
    "randomness": (
        "Random number generators",
        "For 688,884 parameters, as in the VAE. Words are random bits, normals are those of "
        "`jax.random.normal`. Noise is that of `privatize`: with one normal draw, with four, and "
        "with `mechanisms.DiscreteGaussian`.",
    ),
    "accounting": (
        "Accounting",
        "For 60,000 examples, batches of 128 and δ = 1e-5. Each call has new arguments, so no "
        "result is cached.",
    ),
    "training": (
        "The training loop, and a checkpoint",
        "A step of the VAE with batches of 128 out of 4,096, in `fit` and in other loops.",
    ),
}


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the page next to the folder of measurements, and its figures into the folder.

    Args:
        folder: holds one folder per device, with JSON files.

    Returns:
        The path of the page.
    """
    page = folder.with_suffix(".md")
    parts = [HEADER.format(folder=folder.name)]
    devices = sorted(path for path in folder.iterdir() if path.is_dir())
    if [device.name for device in devices] == ["cpu"]:
        parts.append(CPU_ALONE)
    for device in devices:
        found = {path.stem: results.load(path) for path in sorted(device.glob("*.json"))}
        if found:
            parts += _device(device, found, folder.parent)
    page.write_text("\n".join(part.strip("\n") + "\n" for part in parts))
    return page


def _device(
    device: pathlib.Path, found: dict[str, dict[str, Any]], root: pathlib.Path
) -> Iterator[str]:
    machines = sorted({record["machine"] for record in found.values()})
    dates = sorted(_dates(found.values()))
    period = " to ".join(sorted({dates[0], dates[-1]}))
    yield f"## {device.name}\n\n{'; '.join(machines)}; measured {period}."
    if "quick" in found:
        yield DEFAULTS
        yield from _defaults(found["quick"])
    if "side_by_side" in found:
        yield from _side_by_side(device, found["side_by_side"], root)
    known: dict[str, Callable[[dict[str, results.Cells]], str]] = {
        "ablation": _plain_table,
        "layers": _ratio_table,
        "growth": _ratio_table,
        "largest_batch": _batches,
    }
    texts = {"ablation": ABLATION, "layers": LAYERS, "growth": GROWTH, "largest_batch": LARGEST}
    for name, table in known.items():
        if name in found:
            yield texts[name]
            yield table(found[name]["cells"])
            picture = pictures.of_study(name, found[name]["cells"], device)
            if picture:
                yield f"![{name}]({picture.relative_to(root)})"
    if "scale" in found:
        yield SCALE
        yield _table(
            ["", "", "plain", "private", "ratio", "goal"], scale.table(found["scale"]["cells"])
        )
    for name, (title, text) in OTHERS.items():
        if name in found:
            yield f"### {title}\n\n{text}"
            yield _list(found[name]["cells"])


def _defaults(record: dict[str, Any]) -> Iterator[str]:
    yield quick.summary(record)
    kinds = ["not private", "private", "defaults"]

    def shown(cells: results.Cells, kind: str) -> str:
        text = _milliseconds(results.median(cells[kind]) or 0.0)
        over = results.ratio(cells, kind, "not private")
        return text if kind == "not private" or over is None else f"{text} ({over:.2f}×)"

    rows = [
        [title, *(shown(cells, kind) for kind in kinds)]
        for title, cells in sorted(record["cells"].items(), key=lambda row: _by_batch(row[0]))
        if "defaults" in cells
    ]
    yield _table(["model, batch", *kinds], rows)
    if "noise" in record["cells"]:
        yield "The noise of the VAE, by the type of key:"
        yield _list({"noise": record["cells"]["noise"]})


def _by_batch(title: str) -> tuple[int, int]:
    """Sorts rows by batch size, and then in the order of the models."""
    model, _, batch = title.partition(", ")
    models = list(PARAMETER_COUNTS)
    return int(batch or 0), models.index(model) if model in models else -1


def _dates(records: Iterable[dict[str, Any]]) -> set[str]:
    return {
        record.get("read", {}).get(name, record)["date"]
        for record in records
        for name in record["cells"] or [""]
    }


def _side_by_side(
    device: pathlib.Path, record: dict[str, Any], root: pathlib.Path
) -> Iterator[str]:
    yield SIDE
    shown = []
    for peer, versions in record["versions"].items():
        if "error" in versions:
            shown.append(f"{PEERS[peer].title}: {versions['error']}")
    torch = record["versions"].get("torch", {})
    ours = record["versions"].get("dpoptax", {})
    theirs = record["versions"].get("jax_privacy", {})
    found = {**ours, **theirs, **torch}
    yield ", ".join(f"{name} {found[name]}" for name in sorted(found) if name != "device") + "."
    batches = sorted({int(name.split(", ")[1]) for name in record["cells"]})
    for batch in batches:
        rows = _rows(record, batch)
        peers = [peer for peer in PEERS if any(peer in cells for cells in rows.values())]
        titles = [PEERS[peer].title for peer in peers]
        yield f"Batch {batch}:\n\n" + _table(
            ["model", "parameters", *titles],
            [
                [model, f"{PARAMETER_COUNTS[model]:,}", *_steps(cells, peers)]
                for model, cells in rows.items()
            ],
        )
        for model, cells in rows.items():
            shown += [
                f"{PEERS[peer].title}, {model}, batch {batch}: {cell['error']}"
                for peer, cell in cells.items()
                if "error" in cell
            ]
        picture = pictures.side_by_side(rows, batch, device)
        yield f"![Side by side, batch {batch}]({picture.relative_to(root)})"
    if shown:
        yield "What did not run:\n\n" + "\n".join(f"- {line}" for line in shown)
    rows = _rows(record, 128)
    if rows:
        peers = [peer for peer in PEERS if any(peer in cells for cells in rows.values())]
        titles = [PEERS[peer].title for peer in peers]
        yield STARTING
        yield _table(
            ["model", *titles],
            [
                [model, *(_starting(cells.get(peer)) for peer in peers)]
                for model, cells in rows.items()
            ],
        )
        picture = pictures.cumulative(rows, device)
        yield f"![Time until a step is done]({picture.relative_to(root)})"
        yield EPOCHS
        yield _table(
            ["model", *titles, "published"],
            [
                [model, *(_epoch(model, cells.get(peer)) for peer in peers), _published(model)]
                for model, cells in rows.items()
                if model in PUBLISHED
            ],
        )


def _rows(record: dict[str, Any], batch: int) -> dict[str, results.Cells]:
    names = {model: f"{model}, {batch}" for model in PARAMETER_COUNTS}
    return {
        model: record["cells"][name] for model, name in names.items() if name in record["cells"]
    }


def _steps(cells: results.Cells, peers: list[str]) -> list[str]:
    private = {
        peer: seconds
        for peer in peers
        if peer not in PLAIN.values() and (seconds := results.median(cells.get(peer))) is not None
    }
    fastest = min(private, key=private.__getitem__, default=None)
    reach = 0.0 if fastest is None else _ends(cells[fastest])[1]
    texts = []
    for peer in peers:
        seconds = results.median(cells.get(peer))
        if seconds is None:
            texts.append("does not run" if peer in cells else "")
            continue
        text = _milliseconds(seconds)
        if peer in private and _ends(cells[peer])[0] <= reach:
            text = f"**{text}**"
        if len(cells[peer]["seconds"]) > 1:
            text += f" ±{results.spread(cells[peer]):.0%}"
        over = results.ratio(cells, peer, results.base_of(peer))
        texts.append(text if peer in PLAIN.values() or over is None else f"{text} ({over:.2f}×)")
    return texts


def _ends(cell: dict[str, Any]) -> tuple[float, float]:
    """Returns the median minus and plus the spread."""
    middle, spread = results.median(cell) or 0.0, results.spread(cell)
    return middle * (1 - spread), middle * (1 + spread)


def _starting(cell: dict[str, Any] | None) -> str:
    if results.median(cell) is None:
        return ""
    assert cell is not None
    memory = cell.get("mib")
    return f"{cell['start_seconds']:.1f} s" + ("" if memory is None else f", {memory:.1f} MiB")


def _epoch(model: str, cell: dict[str, Any] | None) -> str:
    seconds = results.median(cell)
    if seconds is None:
        return ""
    assert cell is not None
    epoch = seconds * PUBLISHED[model][0] / 128
    return f"{epoch:.2f} ({epoch + cell['start_seconds']:.1f})"


def _published(model: str) -> str:
    return " / ".join(text for text in PUBLISHED[model][1:] if text)


def _names(cells: dict[str, results.Cells]) -> list[str]:
    """Returns the columns of all rows, in order."""
    return list(dict.fromkeys(name for row in cells.values() for name in row))


def _plain_table(cells: dict[str, results.Cells]) -> str:
    names = _names(cells)
    rows = [
        [title, *(_cell(row.get(name), lambda cell: "") for name in names)]
        for title, row in cells.items()
    ]
    return _table(["", *names], rows)


def _ratio_table(cells: dict[str, results.Cells]) -> str:
    names = _names(cells)

    def details(row: results.Cells, name: str) -> str:
        over = results.ratio(row, name, "plain")
        ratio = "" if over is None or name == "plain" else f" ({over:.2f}×)"
        return f"{ratio}, {row[name]['mib']:.1f} MiB"

    rows = [
        [
            title,
            *(
                _cell(row.get(name), lambda cell, row=row, name=name: details(row, name))
                for name in names
            ),
        ]
        for title, row in cells.items()
    ]
    return _table(["", *names], rows)


def _cell(cell: dict[str, Any] | None, details: Callable[[dict[str, Any]], str]) -> str:
    seconds = results.median(cell)
    if seconds is None or cell is None:
        return ""
    return _milliseconds(seconds) + details(cell)


def _batches(cells: dict[str, results.Cells]) -> str:
    names = _names(cells)
    rows = [[title, *(f"{row[name]['batch']:,}" for name in names)] for title, row in cells.items()]
    return _table(["", *(PEERS[name].title for name in names)], rows)


def _list(cells: dict[str, results.Cells]) -> str:
    rows = []
    for title, row in cells.items():
        for name in row:
            seconds = results.median(row[name])
            over = results.ratio(row, name, results.base_of(name))
            ratio = "" if over is None else f"{over:.2f}× {results.base_of(name)}"
            text = "" if seconds is None else _time(seconds)
            rows.append([title, name, text, ratio])
    return _table(["", "", "median", "ratio"], rows)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{_milliseconds(seconds)} ms"


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---" for _ in header], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
