"""Synthetic data: they follow the data, carry their uncertainty, and come with their reports."""

import csv
import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import scipy.stats
from synthetic.simulated import SCHEMA, estimates, simulate

from dpoptax.__main__ import main
from dpoptax._command_line.synthesize import _read
from dpoptax.synthetic import synthesize
from dpoptax.vi.contrib import combine_synthetic_estimates

ROWS, DELTA = 4000, 1e-6


@pytest.fixture(scope="module")
def made():
    pytest.importorskip("mbi")
    return synthesize(
        simulate(0, ROWS), SCHEMA, epsilon=2.0, delta=DELTA, num_sets=3, key=jax.random.key(0)
    )


@pytest.mark.slow
def test_synthetic_data_have_the_dependences_of_the_data(made):
    real, synthetic = estimates(simulate(0, ROWS)), estimates(made.sets[0])
    # Both are samples, and the noise is of about that size at this epsilon.
    error = np.sqrt(3 * real[:, 1] + synthetic[:, 1])
    assert np.all(np.abs(real[:, 0] - synthetic[:, 0]) < 4.5 * error)
    # Columns drawn on their own would fail by far.
    rng = np.random.default_rng(0)
    shuffled = {name: rng.permutation(column) for name, column in made.sets[0].items()}
    assert np.any(np.abs(real[:, 0] - estimates(shuffled)[:, 0]) > 9 * error)


@pytest.mark.slow
def test_the_report_states_the_budget_and_no_private_number(made):
    assert 1.9 < made.report.epsilon <= 2.0
    assert made.report.relation == "add_or_remove_one"
    # The number of rows is noisy; every set has as many.
    rows = {len(column) for table in made.sets for column in table.values()}
    assert rows == {4 * made.report.num_units}
    assert abs(made.report.num_units - ROWS) < 200
    assert "noisy two-way tables" in made.report.released
    assert json.loads(made.report.to_json())["num_units"] == made.report.num_units
    # A noisy number is not stated as the number of rows.
    rows_in_words = f"about {made.report.num_units:,} rows"
    assert f"have {rows_in_words}: the exact number is private" in made.report.in_words()
    assert f"each single row of about {made.report.num_units:,}\n" in str(made.report)
    assert "training used" not in made.report.in_words()
    assert "costs no privacy" in str(made.utility)
    assert str(ROWS) not in repr(made) or made.report.num_units == ROWS


@pytest.mark.slow
def test_results_are_written_as_files(made, tmp_path):
    paths = made.write(tmp_path / "new")
    assert [path.name for path in paths] == [
        *(f"synthetic_{number}.csv" for number in (1, 2, 3)),
        *("privacy_report.txt", "privacy_report.json", "utility_report.txt"),
    ]
    with paths[1].open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(SCHEMA["columns"])
    assert [row[0] for row in rows] == made.sets[1]["group"]


@pytest.mark.filterwarnings("always:the random numbers come from --seed")
@pytest.mark.slow
def test_the_command_writes_tables_reports_and_pictures(tmp_path, capsys):
    pytest.importorskip("mbi")
    pytest.importorskip("matplotlib")
    table = simulate(1, ROWS)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    arguments = ["synthesize", str(tmp_path / "table.csv"), "--schema"]
    arguments += [str(tmp_path / "schema.json"), "--epsilon", "1", "--delta", "1e-6"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--seed", "3"]) == 0
    printed = capsys.readouterr()
    assert "Random noise limits" in printed.out
    assert "--seed 3, so nothing here is private" in printed.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"synthetic_1.csv", "one_way.png", "two_way.png", "privacy_report.txt"} <= names

    # The report of a release must not be lost, and a second release is not made first.
    report = (tmp_path / "out" / "privacy_report.json").read_text()
    (tmp_path / "table.csv").rename(tmp_path / "unread.csv")
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "pass another folder as --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "privacy_report.json").read_text() == report

    (tmp_path / "unread.csv").rename(tmp_path / "table.csv")
    (tmp_path / "schema.json").write_text('{"columns": {"group": {"type": "text"}}}')
    assert main([*arguments, "--out", str(tmp_path / "new")]) == 2
    assert "'omit'" in capsys.readouterr().err


def test_a_table_from_a_spreadsheet_begins_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("age,city\n30,oslo\n", encoding="utf-8-sig")
    assert _read(path) == {"age": ["30"], "city": ["oslo"]}


def test_arguments_are_checked_before_anything_is_charged():
    for bad, message in (
        ({"method": "magic"}, "method"),
        ({"target": "nothing"}, "target"),
        ({"num_sets": 0}, "num_sets"),
    ):
        with pytest.raises(ValueError, match=message):
            synthesize({}, SCHEMA, **{"epsilon": 1.0, "delta": 1e-6, **bad})


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax.adam itself mixes an int32 count with floats
def test_tables_with_missing_values_pass_through_the_autoencoder():
    rng = np.random.default_rng(0)
    first = rng.choice(["u", "v"], 3000, p=[0.8, 0.2])
    second = np.where(first == "u", rng.normal(2, 0.5, 3000), rng.normal(8, 0.5, 3000))
    missing = rng.random(3000) < 0.3
    table = {
        "first": first,
        "second": [None if m else v for m, v in zip(missing, second, strict=True)],
    }
    schema = {
        "columns": {
            "first": {"type": "categorical", "values": ["u", "v"]},
            "second": {"type": "real", "range": [0, 10], "bins": 10, "missing": True},
        }
    }
    made = synthesize(
        table, schema, epsilon=8.0, delta=1e-5, method="vae", key=jax.random.key(0), num_sets=2
    )
    assert made.report.epsilon <= 8.0
    assert made.utility is None
    synthetic = made.sets[1]
    is_u = np.array(synthetic["first"]) == "u"
    values = np.array([np.nan if value is None else value for value in synthetic["second"]])
    assert abs(np.isnan(values).mean() - 0.3) < 0.1
    assert abs(is_u.mean() - 0.8) < 0.1
    assert np.nanmean(values[~is_u]) - np.nanmean(values[is_u]) > 2


@pytest.mark.nightly
def test_intervals_from_several_sets_cover_the_population():
    """Rubin's intervals for ten estimates, over repeated data sets at epsilon 1."""
    pytest.importorskip("mbi")
    truth = estimates(simulate(12345, 2_000_000))[:, 0]
    repetitions, num_sets = 60, 10
    covered, alone = [], []
    for seed in range(repetitions):
        made = synthesize(
            simulate(seed, 2000),
            SCHEMA,
            epsilon=1.0,
            delta=1e-5,
            num_sets=num_sets,
            key=jax.random.key(seed),
        )
        found = np.stack([estimates(table) for table in made.sets])
        combined = combine_synthetic_estimates(found[:, :, 0], found[:, :, 1])
        reach = scipy.stats.t.ppf(0.975, combined.degrees_of_freedom) * np.sqrt(combined.variance)
        covered.append(np.abs(combined.estimate - truth) <= reach)
        alone.append(np.abs(found[0, :, 0] - truth) <= 1.96 * np.sqrt(found[0, :, 1]))
    # The ten estimates of a repetition depend on each other: errors are over repetitions.
    by_repetition = np.mean(covered, axis=1)
    error = by_repetition.std() / np.sqrt(repetitions)
    print(f"coverage {by_repetition.mean():.3f} +- {error:.3f}, of one set {np.mean(alone):.3f}")
    print("by estimate", np.mean(covered, axis=0).round(2))
    assert 0.93 - 3 * error < by_repetition.mean() < 0.97 + 3 * error
    # One set, taken for data, understates the uncertainty.
    assert np.mean(alone) < 0.85


@pytest.mark.slow
def test_the_programs_of_the_page_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mbi")
    page = (pathlib.Path(__file__).parents[2] / "docs" / "synthetic_data.md").read_text()
    blocks = dict(re.findall(r"^```(bash|json|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert set(blocks) == {"bash", "json", "python"}
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    region = rng.choice(["north", "south", "elsewhere"], 2000)
    rows = [
        (age, place, hours, "" if hours == 0 else 1000 + 500 * hours, "somebody")
        for age, place, hours in zip(
            rng.integers(18, 91, 2000), region, rng.choice([0, 20, 40], 2000), strict=True
        )
    ]
    with pathlib.Path("table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("age", "region", "hours", "income", "name"), *rows])
    pathlib.Path("schema.json").write_text(blocks["json"])
    assert main([*shlex.split(blocks["bash"])[1:], "--no-pictures"]) == 0
    with pathlib.Path("synthetic/synthetic_1.csv").open(newline="") as file:
        synthetic = list(csv.DictReader(file))
    assert {row["region"] for row in synthetic} <= {"north", "south", "other"}
    without = [row["income"] == "" for row in synthetic if row["hours"] == "0.0"]
    assert np.mean(without) > 0.9

    exec(compile(blocks["python"], "page", "exec"), {})
    mean = float(re.search(r"([\d.]+) years, standard error", capsys.readouterr().out).group(1))
    assert abs(mean - (80 - 8 * 0.3)) < 1
