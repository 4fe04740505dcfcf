"""Published experiments: runs go on where they stopped, and the page shows what there is."""

import pathlib

import pytest

from reproduce import hierarchical, page, runs
from reproduce.__main__ import PARTS

ROOT = pathlib.Path(__file__).parents[2]


def test_a_run_with_a_record_is_not_run_again_and_a_crash_keeps_the_others(tmp_path):
    path, calls = tmp_path / "records.json", []

    def compute(name):
        if name == "third" and len(calls) == 2:
            calls.append(name)
            raise KeyboardInterrupt
        calls.append(name)
        return {"value": len(calls)}

    chosen = [runs.Run(name, 1, lambda n=name: compute(n)) for name in ("first", "second", "third")]
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(chosen, path)
    assert set(runs.load(path)) == {"first", "second"}
    records = runs.run_all(chosen, path)
    assert calls == ["first", "second", "third", "third"]
    assert [records[run.name]["value"] for run in chosen] == [1, 2, 4]


def test_names_of_runs_differ():
    names = [run.name for part in PARTS.values() for run in part.runs((0, 1))]
    assert len(set(names)) == len(names)


def test_the_page_shows_the_records_there_are(tmp_path):
    records = {
        "vae: private, seed 0": {
            "epsilon": 0.535, "test_loss": 174.0, "test_loss_of_average": 173.0,
        },
        "hierarchical: N 500, seed 0, plain": {"auc": 0.61},
        "hierarchical: N 500, seed 0, epsilon 2": {"auc": 0.98},
        "hierarchical: N 500, seed 1, epsilon 2": {"auc": 0.96},
        "mixture: noise 0.27, seed 0": {"epsilon": 30.0, "log_likelihood": -3.7},
        "adult: aligned, epsilon 10, seed 0": {"accuracy": 84.2},
        "adult: aligned, epsilon 2, seed 0": {"accuracy": 84.1},
        "adult: aligned, not private, seed 0": {"accuracy": 84.3},
        "batches: secure keys, size 128": {
            "private": 8.0, "same batches": 4.0, "private, fixed size": 5.0, "not private": 2.0,
            "private / same batches": 2.0, "private / not private": 4.0,
            "private, fixed size / not private": 2.5,
        },
    }  # fmt: skip
    page.write(records, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| private, ε = 0.535 | 174.00 | 173.00 | 174.06 ± 0.59 | 171.26 ± 3.67 |" in text
    assert "| 500 | 0.610 |  | 0.970 ± 0.014 |  |  |  |" in text
    assert "| 0.27 | 30.000 | -3.700 |" in text
    assert "| gradients | epsilon 2 | epsilon 10 | not private |" in text
    assert "| aligned | 84.10 | 84.20 | 84.30 |" in text
    assert "With secure keys:" in text
    assert "| 128 | 8.0 | 4.0 | 5.0 | 2.0 | 2.00 | 4.00 | 2.50 |" in text
    assert (tmp_path / "page_hierarchical.png").stat().st_size > 5000


def test_the_page_in_the_docs_is_that_of_its_records(tmp_path):
    page.write(runs.load(ROOT / "docs" / "reproduction.json"), tmp_path / "reproduction.md")
    expected = (tmp_path / "reproduction.md").read_text()
    assert (ROOT / "docs" / "reproduction.md").read_text() == expected


def test_the_worlds_of_the_hierarchical_model_are_drawn_alike():
    (x, features, y), (test_x, _, _) = hierarchical.data(200, seed=3)
    again, _ = hierarchical.data(200, seed=3)
    assert x.shape == (200, 5)
    assert len(test_x) == 5000
    assert len({tuple(row) for row in features.tolist()}) == 3
    assert set(y.tolist()) == {0.0, 1.0}
    assert all((a == b).all() for a, b in zip((x, features, y), again, strict=True))
