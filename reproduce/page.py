"""Writes the reproduction page: published numbers next to ours."""

import collections
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable

from dpoptax.reports import round_up
from reproduce import batches, pictures
from reproduce.runs import Record

HEADER = """# Reproductions

`python -m reproduce --out docs` writes this page. The records are in [{records}]({records}). `make
reproduce-d3p` repeats all experiments into `out`. For experiments with several seeds, numbers are
means over seeds, and the number after ± is the standard deviation.
"""
VAE = """
## The VAE on {title}

784-400-50-400-784 units, 688,884 parameters, clip 10, batches of 128, 20 epochs, noise multiplier
1.5. Pixels are drawn again each time an image is used. The test loss is the negative ELBO in nats
per image; an untrained model has 543.4. "Average" uses the mean of the last iterates, which costs
no privacy. The tuned model is smaller (784-200-10) and takes 300 steps with batches of 4,096 at the
same epsilon. Its settings were chosen by the test loss of about fifteen runs, which the epsilon
does not cover.

| run | dpoptax | dpoptax, average | d3p | TF Privacy |
|---|---|---|---|---|
"""
PUBLISHED_VAE = {
    "private": ("174.06 ± 0.59", "171.26 ± 3.67"),
    "not private": ("99.63 ± 0.30", "105.50 ± 1.84"),
    "tuned": ("", ""),
}
PUBLISHED_FASHION = {
    "private": ("304.74 ± 0.68", "303.14 ± 8.79"),
    "not private": ("243.99 ± 0.29", "244.40 ± 7.56"),
    "tuned": ("", ""),
}
LAWS = """
The cost of the run depends on how its batches are drawn. All rows have δ = 1/60,000. The paper
states ε ≈ 0.5, as in the first row. Its code draws without replacement, as in the last row.

| batches, neighbouring relation | epsilon |
|---|---|
"""
HIERARCHICAL = """
## Hierarchical logistic regression

Area under the ROC curve for 5,000 new people from the same distribution; δ = 1/N, 100,000 steps,
aligned gradients. The number after ± is over seeds. The paper finds that at N = 500 a model with ε
≥ 4 is close to the model without privacy, and that ε = 2 is below it but above a plain logistic
regression.

"""
MIXTURE = """
## A mixture of five normals

Predictive log-likelihood of new points: 2,000 points, 1,000 steps, δ = 0.001, a NumPyro autoguide
with `dpoptax.vi.numpyro.DPSVI`, one seed. The paper states ε from 10 to 0.1 for another way of
drawing batches. The values here are for Poisson batches and the relation add-or-remove-one.

| noise multiplier | epsilon | log-likelihood |
|---|---|---|
"""


ADULT = """
## Logistic regression on Adult

Test accuracy in percent of the posterior predictive of a mean-field guide, at δ = 1e-5. Logistic
regression by scikit-learn with the same prior reaches {converged}. "Aligned" makes the gradient of
the latents private, "vanilla" the gradient of location and scale.

| gradients | {kinds} |
|---{dashes}|
"""
BATCHES = """
## The cost of a batch

Seconds per epoch of the MNIST VAE on two cores, with the steps of `training.fit`. "Private": padded
Poisson batches. "Same batches": the same batches without clipping and noise. "Private, fixed size"
and "not private": batches of exactly this size, as the paper draws them, with and without privacy.
Steps that are not private do not depend on the type of key. Where they differ between the two
tables, the machine was busier. Only the ratios can be compared.
"""
EPOCHS = """
With {keys}:

| batch | {columns} |
|---{dashes}|
"""
DRAWING = """
Microseconds to draw the indices of 128 examples without replacement, one batch at a time, as in
Table 3 of the paper: by our Feistel permutation, which `Shuffled` uses, and by `jax.random.choice`,
which shuffles the whole population for each batch.

| population | Feistel | `jax.random.choice` |
|---|---|---|
"""


def write(records: dict[str, Record], path: pathlib.Path) -> None:
    """Writes the page with all parts that have records, and the figures next to it."""
    text = HEADER.format(records=path.with_suffix(".json").name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text += _vae(records, "vae", "MNIST", PUBLISHED_VAE) + _laws(records)
    text += _vae(records, "fashion vae", "Fashion-MNIST", PUBLISHED_FASHION)
    text += _hierarchical(records, path.with_name(f"{path.stem}_hierarchical.png"))
    text += _mixture(records, path.with_name(f"{path.stem}_mixture.png")) + _adult(records)
    text += _batches(records, path.with_name(f"{path.stem}_batches.png"))
    path.write_text(text)


def _grouped(
    records: dict[str, Record], part: str, key: Callable[[str], str]
) -> dict[str, list[Record]]:
    """Groups the records of a part by their names without the seed."""
    groups = collections.defaultdict(list)
    for name, record in records.items():
        if name.startswith(f"{part}: ") and "seed" in name:
            groups[key(name.removeprefix(f"{part}: "))].append(record)
    return groups


def _mean(records: Iterable[Record], field: str, digits: int) -> str:
    values = [record[field] for record in records]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _vae(
    records: dict[str, Record], part: str, title: str, published: dict[str, tuple[str, str]]
) -> str:
    groups = _grouped(records, part, lambda name: name.split(", seed")[0])
    text = ""
    for name, (d3p, tensorflow) in published.items():
        if found := groups.get(name):
            epsilon = found[0]["epsilon"]
            label = name if epsilon is None else f"{name}, ε = {round_up(epsilon)}"
            ours = _mean(found, "test_loss", 2), _mean(found, "test_loss_of_average", 2)
            text += f"| {label} | {ours[0]} | {ours[1]} | {d3p} | {tensorflow} |\n"
    return VAE.format(title=title) + text if text else ""


def _laws(records: dict[str, Record]) -> str:
    laws = records.get("vae: laws", {})
    rows = sorted((value, name) for name, value in laws.items() if "," in name)
    lines = [f"| {name} | {round_up(value)} |\n" for value, name in rows]
    return LAWS + "".join(lines) if lines else ""


def _hierarchical(records: dict[str, Record], picture: pathlib.Path) -> str:
    groups = _grouped(
        records,
        "hierarchical",
        lambda name: f"{name.split(',')[0]},{name.rsplit(',', 1)[1]}",
    )
    if not groups:
        return ""
    sizes = sorted({int(name.split(",")[0].split()[1]) for name in groups})
    kinds = ["plain", "epsilon 1", "epsilon 2", "epsilon 4", "epsilon 8", "not private"]
    text = HIERARCHICAL + "| N | " + " | ".join(kinds) + " |\n"
    text += "|---" * (len(kinds) + 1) + "|\n"
    curves: dict[str, list[float]] = {kind: [] for kind in kinds}
    for size in sizes:
        cells = []
        for kind in kinds:
            found = groups.get(f"N {size}, {kind}", [])
            cells.append(_mean(found, "auc", 3) if found else "")
            curves[kind].append(statistics.mean(r["auc"] for r in found) if found else float("nan"))
        text += f"| {size} | " + " | ".join(cells) + " |\n"
    pictures.areas(sizes, curves, picture)
    return f"{text}\n![area under the curve over N]({picture.name})\n"


def _mixture(records: dict[str, Record], picture: pathlib.Path) -> str:
    groups = _grouped(records, "mixture", lambda name: name.split(", seed")[0])
    if not groups:
        return ""
    truth = groups.pop("truth", [])
    text = MIXTURE
    if truth:
        text += f"| the true distribution | | {_mean(truth, 'log_likelihood', 3)} |\n"
    curve = []
    for noise, found in sorted((float(name.split()[1]), found) for name, found in groups.items()):
        epsilon = found[0]["epsilon"] if noise else None
        value = _mean(found, "log_likelihood", 3)
        text += f"| {noise:g} | {round_up(epsilon) if noise else '∞'} | {value} |\n"
        curve.append((epsilon, statistics.mean(record["log_likelihood"] for record in found)))
    true = statistics.mean(record["log_likelihood"] for record in truth) if truth else None
    pictures.likelihoods(curve, true, picture)
    return f"{text}\n![log-likelihood over epsilon]({picture.name})\n"


def _adult(records: dict[str, Record]) -> str:
    groups = _grouped(records, "adult", lambda name: name.split(", seed")[0])
    if not groups:
        return ""
    kinds = sorted(
        {name.split(", ")[1] for name in groups},
        key=lambda kind: math.inf if kind == "not private" else float(kind.split()[1]),
    )
    converged = records.get("adult: converged", {}).get("accuracy", math.nan)
    text = ADULT.format(
        converged=f"{converged:.2f}", kinds=" | ".join(kinds), dashes="|---" * len(kinds)
    )
    for objective in dict.fromkeys(name.split(", ")[0] for name in groups):
        cells = (groups.get(f"{objective}, {kind}", []) for kind in kinds)
        row = " | ".join(_mean(found, "accuracy", 2) if found else "" for found in cells)
        text += f"| {objective} | {row} |\n"
    return text


def _batches(records: dict[str, Record], picture: pathlib.Path) -> str:
    text = ""
    columns = ("private", "same batches", "private, fixed size", "not private")
    ratios = tuple(f"{name} / {base}" for name, base in batches.RATIOS)
    heads = (*columns, *ratios)
    for keys in batches.KEYS:
        start = f"batches: {keys}, size "
        found = {
            int(name.removeprefix(start)): record
            for name, record in records.items()
            if name.startswith(start)
        }
        if not found:
            continue
        sizes = dict(sorted(found.items()))
        text = text or BATCHES
        text += EPOCHS.format(keys=keys, columns=" | ".join(heads), dashes="|---" * len(heads))
        for size, record in sizes.items():
            cells = [f"{record[column]:.1f}" for column in columns]
            cells += [f"{record[ratio]:.2f}" for ratio in ratios]
            text += f"| {size} | {' | '.join(cells)} |\n"
        if keys == "default keys":
            pictures.epochs(sizes, columns, picture)
            text += f"\n![seconds per epoch over the batch size]({picture.name})\n"
    drawn = {
        int(name.removeprefix("batches: of ")): record
        for name, record in records.items()
        if name.startswith("batches: of ")
    }
    if drawn:
        text += DRAWING
        for population, record in sorted(drawn.items()):
            text += f"| {population:,} | {record['Feistel']:.0f} | {record['choice']:.0f} |\n"
    return text
