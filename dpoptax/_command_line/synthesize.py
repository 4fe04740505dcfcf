"""Command `dpoptax synthesize`: private synthetic data from a table."""

import argparse
import csv
import importlib.util
import json
import pathlib
import warnings
from typing import Any

from dpoptax._command_line.help_text import add_json, help_text, print_json
from dpoptax._command_line_errors import faults_of_file
from dpoptax.reports._text import remark_on_delta
from dpoptax.reports._values import ReportValues


def add_synthesize(commands: Any) -> None:
    """Adds the command."""
    synthesizer = commands.add_parser(
        "synthesize",
        help="make private synthetic data from a table",
        **help_text(
            "Reads a CSV file with a header and a public schema, and writes synthetic tables, the "
            "privacy report and a utility report. docs/synthetic_data.md describes the schema.",
            "synthesize table.csv --schema schema.json --epsilon 1 --delta 1e-6 --out synthetic",
            "synthesize table.csv --schema schema.json --epsilon 1 --delta 1e-6 --out five "
            "--sets 5 --target income --json",
        ),
    )
    synthesizer.add_argument("table", type=pathlib.Path, help="a CSV file with a header")
    synthesizer.add_argument(
        "--schema",
        type=pathlib.Path,
        required=True,
        metavar="FILE",
        help="JSON with the type and the public range or categories of each column",
    )
    synthesizer.add_argument("--epsilon", type=float, required=True, metavar="EPS")
    synthesizer.add_argument(
        "--delta", type=float, required=True, metavar="D", help="well below 1 / rows"
    )
    synthesizer.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="DIR", help="a new folder for results"
    )
    synthesizer.add_argument(
        "--sets",
        type=int,
        default=1,
        metavar="M",
        help="how many synthetic tables; several of them carry the uncertainty for Rubin's rules; "
        "default 1",
    )
    synthesizer.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="rows of each synthetic table; default as many as the noisy counts say, and four "
        "times as many for several sets",
    )
    synthesizer.add_argument(
        "--method", choices=["marginals", "vae"], default="marginals", help="default marginals"
    )
    synthesizer.add_argument(
        "--target", metavar="COLUMN", help="a column that the data will be used to predict"
    )
    synthesizer.add_argument(
        "--no-pictures", action="store_true", help="draw no pictures, which need matplotlib"
    )
    synthesizer.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="for tests only: random numbers that anybody can repeat, so that nothing is private",
    )
    add_json(synthesizer)
    synthesizer.set_defaults(run=_synthesize)


def _synthesize(options: argparse.Namespace) -> int:
    from dpoptax.random import insecure_key
    from dpoptax.synthetic import Schema, synthesize
    from dpoptax.synthetic._synthesize import REPORT_FILE

    with faults_of_file(str(options.schema)):
        schema = Schema.from_json(options.schema.read_text())
    # What may fail, fails before the budget is spent.
    earlier = options.out / REPORT_FILE
    if earlier.exists():
        raise ValueError(
            f"{earlier} is the report of an earlier release. Both releases cost privacy, so keep "
            "it: pass another folder as --out."
        )
    table = _read(options.table)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.no_pictures and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install matplotlib; or pass --no-pictures.")
    made = synthesize(
        table,
        schema,
        epsilon=options.epsilon,
        delta=options.delta,
        num_sets=options.sets,
        num_rows=options.rows,
        method=options.method,
        target=options.target,
        key=None if options.seed is None else insecure_key(options.seed),
    )
    paths = made.write(options.out)
    if not options.no_pictures:
        paths += made.save_pictures(options.out)
    _warn(options, made.report)
    if options.json:
        report = json.loads(made.report.to_json())
        print_json(report=report, written=[str(path) for path in paths])
    else:
        print(made.report.in_words())
        print("\nWritten:", *paths, sep="\n  ")
    return 0


def _warn(options: argparse.Namespace, report: ReportValues) -> None:
    """Warns of what the words of the report leave out."""
    if options.seed is not None:
        warnings.warn(
            f"the random numbers come from --seed {options.seed}, so nothing here is private. Use "
            "it for tests only.",
            UserWarning,
            stacklevel=2,
        )
    # The exact number of rows is private.
    remark = remark_on_delta(report.delta, report.num_units, report.unit)
    if remark:
        warnings.warn(f"--delta {report.delta:g}{remark}.", UserWarning, stacklevel=2)


def _read(path: pathlib.Path) -> dict[str, list[str]]:
    """Returns the columns of a CSV file. Errors show line numbers, and no value."""
    try:
        # Spreadsheets begin such a file with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error, ValueError):
        raise ValueError(f"{path} is not a CSV file with a header, in UTF-8.") from None
    names = [name.strip() for name in header]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: two columns have the same name. Is the first line a header?")
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise ValueError(
                f"{path}: row {number} has {len(row)} entries, but the header has {len(names)}."
            )
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}
