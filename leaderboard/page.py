"""Writes the page of the leaderboard: our results beside the published ones, with their sources."""

import inspect
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence

from dpoptax.reports import round_up
from leaderboard import pictures, records, registry
from leaderboard.recipe import Recipe
from leaderboard.records import Record
from leaderboard.task import Metric, Published, Task

HEADER = """# Leaderboard

The highest accuracy that we reach with dpoptax at a given ε, beside published results.
[leaderboard/recipes](../leaderboard/recipes) holds one short file for each row, and
[leaderboard](leaderboard) one line for each run. `make leaderboard ARGS="--only digits"` repeats
the runs of a task into `out`. `python -m leaderboard --only page --out docs` writes this page from
the stored lines, without a run.

Tables show means over seeds, and the number after ± is the standard deviation. The ε of a column is
the budget of its runs, under the relation add or remove one example. The report of each run states
at most this ε; the column "largest ε in the reports" has the largest. It covers the run, and not
the choice of the settings: the column "settings chosen" says what that choice used. "Not private"
is the same recipe without noise.

Rows with suggested settings take all of them from `dpoptax.suggest`. We chose its rules with
measurements on other models of digits, breast cancer and Adult, and its clip rule on splits of the
training examples of the first two ([choosing](choosing.md)). Only the settings for MNIST were fixed
before we measured anything on the task. What `suggest` says about the norm of features comes from
training examples of MNIST and 20 Newsgroups.
"""
DETAILS = """
| recipe | parameters | seconds for a run | largest ε in the reports | settings chosen |
|---|---|---|---|---|
"""
PUBLISHED = """
Published results:

| method | ε | {metrics} | source |
|---|---|---{dashes}|
"""
PLACE = "leaderboard"  # the folder of records and pictures, next to the page


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes `leaderboard.md` into the folder, and the pictures next to the records."""
    kept = folder / PLACE
    kept.mkdir(parents=True, exist_ok=True)
    text = HEADER
    by_task = _records_by_task(kept)
    for name, task in registry.all_tasks().items():
        if rows := by_task.get(name):
            text += _section(task, rows, kept)
    page = folder / "leaderboard.md"
    page.write_text(text)
    return page


def _records_by_task(kept: pathlib.Path) -> dict[str, dict[Recipe, list[Record]]]:
    found: dict[str, dict[Recipe, list[Record]]] = {}
    for recipe in registry.all_recipes().values():
        if rows := records.load(kept, recipe.name):
            found.setdefault(recipe.task, {})[recipe] = rows
    return found


def _section(task: Task, rows: dict[Recipe, list[Record]], kept: pathlib.Path) -> str:
    text = f"\n## {task.title}\n\n{task.about} δ = {task.delta:g}.\n"
    ordered = sorted(rows, key=lambda recipe: _best(task.metrics[0], rows[recipe]), reverse=True)
    for metric in task.metrics:
        text += _table(metric, task, {recipe: rows[recipe] for recipe in ordered})
    picture = kept / f"{task.name}.png"
    pictures.scores_over_epsilon(task, {r: rows[r] for r in ordered}, picture)
    text += f"\n![{_names(task.metrics)} over ε on {task.title}]({PLACE}/{picture.name})\n"
    text += DETAILS
    for recipe in ordered:
        text += _detail(recipe, rows[recipe])
    for recipe in ordered:
        if recipe.notes:
            text += f"\n{recipe.title[0].upper()}{recipe.title[1:]}: {recipe.notes}\n"
    return text + _published(task)


def _table(metric: Metric, task: Task, rows: dict[Recipe, list[Record]]) -> str:
    runs = sorted({record["run"] for found in rows.values() for record in found}, key=float)
    heads = ["not private" if run == "inf" else f"ε = {run}" for run in runs]
    unit = f" ({metric.unit})" if metric.unit else ""
    direction = "" if metric.higher_is_better else ", lower is better"
    text = (
        f"\n| {metric.name}{unit}{direction} | {' | '.join(heads)} |\n|---{'|---' * len(runs)}|\n"
    )
    for recipe, found in rows.items():
        cells = []
        for run in runs:
            values = scores(found, run, metric)
            spread = f" ± {statistics.stdev(values):.{metric.digits}f}" if values[1:] else ""
            cells.append(f"{statistics.mean(values):.{metric.digits}f}{spread}" if values else "")
        text += f"| {recipe.title} | {' | '.join(cells)} |\n"
    return text


def scores(found: Iterable[Record], run: str, metric: Metric) -> list[float]:
    """Returns the scores of the runs at one epsilon, one for each seed."""
    return [
        record["scores"][metric.name]
        for record in found
        if record["run"] == run and metric.name in record["scores"]
    ]


def _best(metric: Metric, found: Sequence[Record]) -> float:
    """The mean score at the smallest epsilons, so that rows with more epsilons gain nothing."""
    sign = 1 if metric.higher_is_better else -1
    runs = sorted({record["run"] for record in found}, key=float)
    values = scores(found, runs[0], metric)
    return sign * statistics.mean(values) if values else -math.inf


def _detail(recipe: Recipe, found: Sequence[Record]) -> str:
    source = pathlib.Path(inspect.getfile(recipe.train)).name
    sizes = sorted({record["num_parameters"] for record in found})
    seconds = [record["seconds"] for record in found]
    private = [record["epsilon"] for record in found if record["epsilon"] is not None]
    largest = str(round_up(max(private))) if private else ""
    return (
        f"| [{recipe.title}](../leaderboard/recipes/{source}) | {sizes[-1]:,} "
        f"| {statistics.median(seconds):.0f} | {largest} | {recipe.tuned} |\n"
    )


def _published(task: Task) -> str:
    if not task.published:
        return ""
    text = PUBLISHED.format(
        metrics=" | ".join(metric.name for metric in task.metrics),
        dashes="|---" * len(task.metrics),
    )
    order = sorted(task.published, key=lambda result: (result.epsilon, -result.value))
    for result in order:
        epsilon = f"{result.epsilon:g}" if math.isfinite(result.epsilon) else "not private"
        cells = [_value(result, metric) for metric in task.metrics]
        note = f"; {result.note}" if result.note else ""
        text += f"| {result.name} | {epsilon} | {' | '.join(cells)} | {result.source}{note} |\n"
    return text


def _value(result: Published, metric: Metric) -> str:
    return f"{result.value:g}" if result.metric == metric.name else ""


def _names(metrics: Sequence[Metric]) -> str:
    return " and ".join(metric.name for metric in metrics)
