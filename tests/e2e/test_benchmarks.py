"""Benchmarks keep what they measured, give a failing peer a line, and tell noise from a change."""

import json
import sys

import jax
import pytest

from benchmarks import compare, page, quick, results, side_by_side


def record(**cells):
    return results.empty() | {"cells": {"vae, 128": cells}, "versions": {}}


def cell(*seconds, **more):
    return {"seconds": list(seconds), "start_seconds": 1.0, "mib": 2.0} | more


PLAIN = cell(1.0, 1.01, 0.99, 1.0, 1.0)


def test_a_step_is_slower_only_beyond_noise_and_beside_its_own_plain_one(tmp_path, monkeypatch):
    before = record(jax=PLAIN, dpoptax=cell(1.2, 1.21, 1.19, 1.2, 1.2), vmap=cell(5, 9, 3, 7, 6))
    cells = before["cells"]["vae, 128"]
    twice = {name: cell(*(2 * s for s in row["seconds"])) for name, row in cells.items()}
    slower = cells | {"dpoptax": cell(*(1.5 for _ in range(5)))}
    for after, expected in (
        (twice, []),  # a slower machine
        (slower, ["dpoptax"]),
        (cells | {"vmap": cell(7, 11, 5, 9, 8)}, []),  # noise
    ):
        found = compare.slower(cells, after)
        assert [name for name, _, _ in found] == expected
    results.save(tmp_path / "before.json", before)
    results.save(tmp_path / "after.json", record(**slower))
    monkeypatch.setattr(
        sys, "argv", ["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    )
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 1


def test_the_page_has_a_line_for_what_did_not_run(tmp_path):
    stored = record(
        jax=PLAIN, dpoptax=cell(1.2, 1.3, 1.2), torch=PLAIN,
        opacus_ghost=cell(error="RuntimeError: cannot"),
    )  # fmt: skip
    stored["versions"] = {"jax_privacy": {"error": "cannot be installed: no index"}}
    results.save(tmp_path / "readings" / "cpu" / "side_by_side.json", stored)
    text = page.write(tmp_path / "readings").read_text()
    assert "**1,200** ±4% (1.21×)" in text
    assert "Opacus, ghost, vae, batch 128: RuntimeError: cannot" in text
    assert "JAX Privacy: cannot be installed: no index" in text
    assert (tmp_path / "readings" / "cpu" / "side_by_side_128.png").stat().st_size > 1000


@pytest.mark.e2e
def test_a_run_keeps_what_it_measured_and_a_peer_that_fails_is_a_line(
    tmp_path, monkeypatch, capsys
):
    """Real processes: two peers, one of which is not to be had."""
    real = side_by_side.python_of

    def python_of(peer):
        if peer == "opacus_ghost":
            raise RuntimeError("cannot be installed: no index")
        return real(peer)

    monkeypatch.setattr(side_by_side, "python_of", python_of)
    out = tmp_path / "found.json"
    arguments = ["side_by_side", "--models", "logistic", "--batches", "4", "--rounds", "2"]
    arguments += ["--peers", "jax", "opacus_ghost", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    side_by_side.main()
    first = json.loads(out.read_text())
    cells = first["cells"]["logistic, 4"]
    assert len(cells["jax"]["seconds"]) == 2
    assert cells["jax"]["parameters"] == 105
    assert "cannot be installed" in cells["opacus_ghost"]["error"]
    assert "cannot be installed" in capsys.readouterr().err
    side_by_side.main()
    assert json.loads(out.read_text())["cells"] == first["cells"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="move it away"):
        results.load(tmp_path / "other.json")


@pytest.mark.e2e
def test_the_quick_table_has_a_row_per_model_and_a_mean_over_models():
    with jax.numpy_dtype_promotion("standard"):
        cells = quick.row("logistic", 16, row_seconds=0.02)
    assert set(cells) == {"not private", "private", "defaults"}
    assert all(len(cell["seconds"]) >= quick.LEAST_ROUNDS for cell in cells.values())
    assert results.ratio(cells, "defaults", results.base_of("defaults")) > 0
    for batch, ratios in ((128, (2.0, 8.0)), (1024, (3.0, 3.0))):
        cells = {
            f"{name}, {batch}": {"not private": cell(1.0), "defaults": cell(over)}
            for name, over in zip(("vae", "lstm"), ratios, strict=True)
        }
        mean = "4.00" if batch == 128 else "3.00"
        summary = quick.summary({"cells": cells | {"noise": {"threefry": PLAIN}}})
        assert summary.splitlines()[-1] == f"- defaults, batch {batch}: {mean}× over 2 models"
