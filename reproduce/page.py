"""Records in, a page with published numbers beside ours and a picture out."""

import collections
import pathlib
import statistics
from collections.abc import Callable, Iterable

from matplotlib.figure import Figure

from reproduce.runs import Record

HEADER = """# Published experiments, run again

Written by `make reproduce-d3p`; the records are in [{records}]({records}). Where there are several
seeds, numbers are means and, after ±, standard deviations over seeds.
"""
VAE = """
## The VAE of MNIST

784-400-50-400-784 units, 688,884 parameters, clip 10, batches of 128, 20 epochs, noise multiplier
1.5, pixels drawn anew at every look. Test loss: negative ELBO in nats per image; 543.4 is a model
that has learnt nothing. "Average" is over the last iterates, at no cost of privacy. The tuned model
is smaller (784-200-10) and takes 300 steps over batches of 4,096 at the same epsilon. Its settings
were chosen by looking at the test loss of some fifteen runs, which the epsilon does not cover.

| run | dpoptax | dpoptax, average | d3p | TF Privacy |
|---|---|---|---|---|
"""
PUBLISHED_VAE = {
    "private": ("174.06 ± 0.59", "171.26 ± 3.67"),
    "not private": ("99.63 ± 0.30", "105.50 ± 1.84"),
    "tuned": ("", ""),
}
LAWS = """
What the run cost depends on how its batches were drawn, at δ = 1/60,000. The paper speaks of
ε ≈ 0.5, the first of these, and its code draws without replacement, the last.

| batches, neighbours | epsilon |
|---|---|
"""
HIERARCHICAL = """
## Hierarchical logistic regression

Area under the curve on 5,000 new people of the same world; δ = 1/N, 100,000 steps, aligned
gradients. The paper finds, at N = 500, that ε ≥ 4 comes near the model without privacy, and that
ε = 2 stays below it yet above a plain logistic regression.

"""
MIXTURE = """
## A mixture of five normals

Predictive log-likelihood of new points; 2,000 points, 1,000 steps, δ = 0.001, an automatic guide of
NumPyro through `dpoptax.vi.svi.DPSVI`. The paper's ε, from 10 down to 0.1, are of another law of
batches than Poisson's under add or remove one, given here.

| noise multiplier | epsilon | log-likelihood |
|---|---|---|
"""


def write(records: dict[str, Record], path: pathlib.Path) -> None:
    """Writes the page, with those parts that have records, and the picture beside it."""
    text = HEADER.format(records=path.with_suffix(".json").name)
    text += _vae(records) + _hierarchical(records, path.with_suffix(".png")) + _mixture(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _grouped(
    records: dict[str, Record], part: str, key: Callable[[str], str]
) -> dict[str, list[Record]]:
    """The records of a part by what is left of their names without the seed."""
    groups = collections.defaultdict(list)
    for name, record in records.items():
        if name.startswith(f"{part}: ") and "seed" in name:
            groups[key(name.removeprefix(f"{part}: "))].append(record)
    return groups


def _mean(records: Iterable[Record], field: str, digits: int) -> str:
    values = [record[field] for record in records]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _vae(records: dict[str, Record]) -> str:
    groups = _grouped(records, "vae", lambda name: name.split(", seed")[0])
    text = ""
    for name, (d3p, tensorflow) in PUBLISHED_VAE.items():
        if found := groups.get(name):
            epsilon = found[0]["epsilon"]
            label = name if epsilon is None else f"{name}, ε = {epsilon:.3f}"
            ours = _mean(found, "test_loss", 2), _mean(found, "test_loss_of_average", 2)
            text += f"| {label} | {ours[0]} | {ours[1]} | {d3p} | {tensorflow} |\n"
    text = VAE + text if text else ""
    if laws := records.get("vae: laws"):
        rows = {name: value for name, value in laws.items() if "," in name}
        lines = [f"| {name} | {value:.3f} |\n" for name, value in sorted(rows.items())]
        text += LAWS + "".join(sorted(lines, key=lambda line: float(line.split("|")[2])))
    return text


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
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    # The plain model lies so far below that one axis would squeeze the others into a line.
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for kind, values in curves.items():
        style = {"plain": ":", "not private": "--"}.get(kind, "-")
        axes = below if kind == "plain" else above
        axes.plot(sizes, values, style, marker="o", label=kind.replace("epsilon", "ε ="))
    for axes in (above, below):
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    below.set(xscale="log", xlabel="people in the data, N")
    below.set_xticks(sizes, [str(size) for size in sizes])
    below.minorticks_off()
    figure.supylabel("area under the curve", fontsize=10)
    figure.savefig(picture)
    return f"{text}\n![area under the curve over N]({picture.name})\n"


def _mixture(records: dict[str, Record]) -> str:
    groups = _grouped(records, "mixture", lambda name: name.split(", seed")[0])
    rows = []
    for name, found in groups.items():
        value = _mean(found, "log_likelihood", 3)
        if name == "truth":
            rows.append((-1.0, f"| the law that drew the points | | {value} |\n"))
        else:
            noise = float(name.split()[1])
            epsilon = f"{found[0]['epsilon']:.2f}" if noise else "∞"
            rows.append((noise, f"| {noise:g} | {epsilon} | {value} |\n"))
    return MIXTURE + "".join(row for _, row in sorted(rows)) if rows else ""
