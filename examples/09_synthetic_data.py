"""Private synthetic data: a table becomes a table of people who do not exist.

    python examples/09_synthetic_data.py                                # a simulated survey
    python examples/09_synthetic_data.py --dataset adult --data-dir DIR  # UCI Adult, two minutes

It prints what a model learns from the synthetic table and from the real one, both tested on real
rows, and how far the tables are apart. These comparisons read the real data, so they are not
private: they show what the method can do. The folder of the results gets the synthetic table, the
privacy report, the utility report, which is private, and pictures. It needs mbi, matplotlib and
scikit-learn: pip install 'dpoptax[synthetic,examples]'.
"""

import argparse
import csv
import itertools
import json
from pathlib import Path

import example_options
import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

import dpoptax
from dpoptax.synthetic import Schema, synthesize

SURVEY = {
    "columns": {
        "age": {"type": "integer", "range": [18, 90], "bins": 24},
        "region": {"type": "categorical", "values": ["north", "south", "east", "west"]},
        "hours": {"type": "mixed", "codes": [0], "range": [1, 80], "bins": 20},
        "income": {"type": "positive", "range": [1000, 200000], "bins": 24, "missing": True},
        "owner": {"type": "categorical", "values": ["yes", "no"]},
    }
}
TARGETS = {"survey": "owner", "adult": "income"}


def survey(seed: int, rows: int) -> dict[str, list]:
    """Draws a table of made-up people."""
    rng = np.random.default_rng(seed)
    age = np.clip(rng.normal(45, 16, rows), 18, 90).astype(int)
    region = rng.choice(4, rows, p=[0.4, 0.3, 0.2, 0.1])
    works = rng.random(rows) < np.where(age < 65, 0.8, 0.1)
    hours = np.where(works, np.clip(rng.normal(38, 9, rows), 1, 80).astype(int), 0)
    income = np.exp(9.5 + 0.02 * hours + 0.1 * region + rng.normal(0, 0.4, rows))
    logit = 0.06 * (age - 45) + 1.2 * np.log(income / 25_000)
    owner = rng.random(rows) < 1 / (1 + np.exp(-logit))
    told = rng.random(rows) < 0.9
    return {
        "age": age.tolist(),
        "region": [SURVEY["columns"]["region"]["values"][index] for index in region],
        "hours": hours.tolist(),
        "income": [float(value) if t else None for value, t in zip(income, told, strict=True)],
        "owner": ["yes" if value else "no" for value in owner],
    }


def adult(path: Path, names: list[str]) -> dict[str, list]:
    """Reads a file of UCI Adult."""
    with path.open() as file:
        rows = [[word.strip().rstrip(".") for word in row] for row in csv.reader(file)]
    rows = [row for row in rows if len(row) == len(names) and row[0].isdigit()]
    if not rows:
        raise ValueError(f"{path} is not a file of UCI Adult: expected rows of {len(names)} values")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def inputs_and_labels(schema: Schema, table: dict, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns cells of categorical columns and numbers of the others; labels are cells."""
    columns = []
    for name, column in schema.columns.items():
        if name != target and column.kind == "categorical":
            columns.append(column.encode(table[name]).cells.astype(float))
        elif name != target:
            columns.append(
                [np.nan if value in (None, "") else float(value) for value in table[name]]
            )
    return np.array(columns, float).T, schema.columns[target].encode(table[target]).cells


def accuracy(schema: Schema, train: dict, test: dict, target: str) -> float:
    """Returns the accuracy on `test` of gradient boosting on `train`, in percent."""
    categorical = [c.kind == "categorical" for name, c in schema.columns.items() if name != target]
    model = HistGradientBoostingClassifier(random_state=0, categorical_features=categorical)
    model.fit(*inputs_and_labels(schema, train, target))
    return 100 * model.score(*inputs_and_labels(schema, test, target))


def distances(schema: Schema, made, real: dict) -> tuple[list[float], list[float]]:
    """Returns total variation of all one-way tables, and of two-way tables of merged cells."""
    cells = [
        {name: column.encode(table[name]).cells for name, column in schema.columns.items()}
        for table in (real, made.sets[0])
    ]

    def distance(first: np.ndarray, second: np.ndarray) -> float:
        size = 1 + max(first.max(), second.max())
        shares = [np.bincount(part, minlength=size) / len(part) for part in (first, second)]
        return 0.5 * float(np.abs(shares[0] - shares[1]).sum())

    one_way = [distance(cells[0][name], cells[1][name]) for name in schema.columns]
    merged = [
        {name: made.measured.coarse[name].group[part] for name, part in table.items()}
        for table in cells
    ]
    two_way = [
        distance(*(1000 * table[first] + table[second] for table in merged))
        for first, second in itertools.combinations(schema.columns, 2)
    ]
    return one_way, two_way


def run(options: argparse.Namespace) -> None:
    if options.dataset == "adult":
        if options.data_dir is None:
            raise ValueError("--data-dir must name the folder with adult.data and adult.test")
        schema = Schema.from_json(Path(__file__).with_name("adult_schema.json").read_text())
        names = list(schema.columns)
        train, test = (
            adult(options.data_dir / f"adult.{part}", names) for part in ("data", "test")
        )
    else:
        schema = Schema.from_json(json.dumps(SURVEY))
        train, test = survey(0, options.rows), survey(1, options.rows)
    target = TARGETS[options.dataset]
    made = synthesize(
        train,
        schema,
        epsilon=options.epsilon,
        delta=options.delta,
        target=target,
        key=None if options.seed is None else dpoptax.random.insecure_key(options.seed),
    )
    paths = [*made.write(options.out), *made.save_pictures(options.out)]
    print(made.report)
    one_way, two_way = distances(schema, made, train)
    print("\nNot private: compared with the real table\n")
    print(f"  accuracy, trained on real rows       {accuracy(schema, train, test, target):.2f} %")
    synthetic = accuracy(schema, made.sets[0], test, target)
    print(f"  accuracy, trained on synthetic rows  {synthetic:.2f} %")
    for name, found in (("one-way", one_way), ("two-way", two_way)):
        print(
            f"  total variation, {name} tables      {np.mean(found):.4f}, at most {max(found):.4f}"
        )
    print("\nWritten:", *paths, sep="\n  ")


def main() -> None:
    parser = example_options.Parser(description="Makes private synthetic data from a table.")
    parser.add_argument("--dataset", choices=list(TARGETS), default="survey")
    parser.add_argument("--data-dir", type=Path, help="folder with adult.data and adult.test")
    parser.add_argument("--rows", type=int, default=20_000, help="of the simulated survey [20000]")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, help="repeats a run; only for tests")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of results [out]")
    with example_options.one_line_errors():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
