"""Schemas: cells come from the schema alone, and errors show no value of the data."""

import jax
import numpy as np
import pytest

from dpoptax.synthetic import Schema
from dpoptax.synthetic._draws import Draws

GOOD = {
    "age": {"type": "integer", "range": [17, 90], "bins": 10},
    "work": {"type": "categorical", "values": ["yes", "no", "else"], "other": "else"},
    "gain": {"type": "mixed", "codes": [0, "unknown"], "range": [1, 99999], "log": True},
    "income": {"type": "positive", "range": [100, 1e6], "bins": 20, "missing": True},
    "score": {"type": "real", "edges": [-1, 0, 0.5, 2]},
    "name": {"type": "omit"},
}
TABLE = {
    "age": [17, 90, 45, 45.0],
    "work": ["yes", "no", "SECRET", " yes "],
    "gain": [0, "unknown", 5.5, 99999],
    "income": ["", 100, None, 1e6],
    "score": [-1, 2, 0.5, 0.0],
    "name": ["SECRET"] * 4,
}


def test_values_become_cells_and_cells_become_values_of_the_same_cells():
    schema = Schema.from_dict({"columns": GOOD})
    encoded = schema.encode(TABLE)
    assert schema.omitted == ("name",)
    assert encoded["work"].cells.tolist() == [0, 1, 2, 0]
    assert encoded["gain"].cells[:2].tolist() == [32, 33]
    assert encoded["income"].cells.tolist() == [20, 0, 20, 19]
    assert encoded["score"].cells.tolist() == [0, 2, 2, 1]
    rng = Draws(jax.random.key(0))
    for column in schema.columns.values():
        cells = np.repeat(np.arange(column.num_cells), 50)
        values = column.decode(cells, rng)
        again = column.encode(values)
        np.testing.assert_array_equal(again.cells, cells)
        np.testing.assert_array_equal(again.counted, cells)
        assert all(column.label(cell) for cell in range(column.num_cells))


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 10, 73, 74, 200])
@pytest.mark.parametrize("log", [False, True])
def test_every_whole_number_of_the_range_is_drawn(bins, log):
    column = Schema.from_dict(
        {
            "columns": {
                "n": {"type": "integer", "range": [1, 20], "bins": bins, "log": log},
                "m": {"type": "integer", "range": [0, 1]},
            }
        }
    ).columns["n"]
    bins = np.random.default_rng(0).integers(column.num_bins, size=5000)
    drawn = column.decode(bins, Draws(jax.random.key(0)))
    assert set(drawn) == set(range(1, 21))


def test_numbers_out_of_range_are_clamped_and_have_cells_of_their_own():
    schema = Schema.from_dict({"columns": GOOD})
    encoded = schema.encode({**TABLE, "age": [3, 17, 90, 1e9]})["age"]
    assert encoded.cells.tolist() == [0, 0, 9, 9]
    assert encoded.counted.tolist() == [10, 0, 9, 11]


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("a", {"type": "text"}, "leave such a column out by the type 'omit'"),
        ("a", {"type": "categorical"}, "needs 'values'"),
        ("a", {"type": "categorical", "values": ["u", "u"]}, "an entry twice"),
        ("a", {"type": "categorical", "values": ["u"], "other": "v"}, "Add it to 'values'"),
        ("a", {"type": "categorical", "values": list(range(2000))}, "at most 1,000"),
        ("a", {"type": "categorical", "values": ["u"], "range": [0, 1]}, "takes missing"),
        ("a", {"type": "real"}, "needs either a 'range'"),
        ("a", {"type": "real", "range": [1, 0]}, "must be finite and increase"),
        ("a", {"type": "real", "range": [0, 1, 2]}, "a 'range' has two numbers"),
        ("a", {"type": "real", "range": [0, 1], "bins": 0}, "bins"),
        ("a", {"type": "real", "range": [0, 1], "bins": 5000}, "at most 1,000"),
        ("a", {"type": "real", "range": [0, float("inf")]}, "must be finite"),
        ("a", {"type": "real", "range": [0, 10**400]}, "must be finite"),
        ("a", {"type": "real", "range": [-1e308, 1e308]}, "must be finite"),
        ("a", {"type": "integer", "range": [3.2, 3.8]}, "without a whole number"),
        ("a", {"type": "integer", "edges": [0, 0.2, 0.8, 5]}, "without a whole number"),
        ("a", {"type": "integer", "edges": [0, 2, 4.2, 4.8]}, "without a whole number"),
        ("a", {"type": "positive", "range": [0, 1]}, "Make 0 one of its 'codes'"),
        ("a", {"type": "mixed", "range": [0, 1]}, "needs 'codes'"),
        ("a", {"type": "real", "range": [0, 1], "missing": "no"}, "true or false"),
        ("a", "real", "must be"),
        ("", {"type": "omit"}, "not empty"),
    ],
)
def test_a_bad_schema_is_refused_by_column(name, entry, message):
    with pytest.raises(ValueError, match=message):
        Schema.from_dict({"columns": {**GOOD, name: entry}})


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"columns": {}}', '{"columns": [], "x": 1}'])
def test_what_is_no_schema_is_refused(text):
    with pytest.raises(ValueError, match="a schema is"):
        Schema.from_json(text)


def test_a_schema_needs_two_columns():
    with pytest.raises(ValueError, match="two columns"):
        Schema.from_dict({"columns": {"age": GOOD["age"], "name": GOOD["name"]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"age": ["SECRET", 1, 2, 3]}, "no numbers"),
        ({"age": [17.123, 1, 2, 3]}, "not.*whole"),
        ({"age": [None, 20, 20, 20]}, "missing values"),
        ({"age": [20] * 3}, "same number of rows"),
        ({"extra": ["SECRET"] * 4}, "does not list"),
        ({"score": ["SECRET", 0, 0, 0]}, "no numbers"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_without_its_values(change, message):
    schema = Schema.from_dict({"columns": GOOD})
    with pytest.raises(ValueError, match=message) as error:
        schema.encode({**TABLE, **change})
    assert "SECRET" not in str(error.value)
    assert "17.123" not in str(error.value)


def test_unseen_categories_are_refused_unless_one_stands_for_them():
    work = {"type": "categorical", "values": ["yes", "no"]}
    schema = Schema.from_dict({"columns": {**GOOD, "work": work}})
    with pytest.raises(ValueError, match="does not list") as error:
        schema.encode(TABLE)
    assert "SECRET" not in str(error.value)
    with pytest.raises(ValueError, match="that the table does not have"):
        schema.encode({"age": TABLE["age"]})


def test_codes_of_numeric_columns_are_compared_as_numbers():
    column = {"type": "mixed", "codes": [0, "none"], "range": [1, 9], "bins": 2, "missing": True}
    other = {"type": "categorical", "values": ["01", "1"]}
    schema = Schema.from_dict({"columns": {"gain": column, "kind": other}})
    gain = ["0", "0.0", " 0e0", 0.0, "none", "nan", "5.0", "inf"]
    encoded = schema.encode({"gain": gain, "kind": ["01", "1"] * 4})
    assert encoded["gain"].cells.tolist() == [2, 2, 2, 2, 3, 4, 1, 1]
    # The texts of categories are not numbers: a code may begin with 0.
    assert encoded["kind"].cells.tolist() == [0, 1] * 4


def test_a_table_without_a_header_is_refused_without_its_first_row():
    schema = Schema.from_dict({"columns": GOOD})
    for table in ({"SECRET": [1], "39": [2]}, {**TABLE, "SECRET": [1] * 4}):
        with pytest.raises(ValueError, match=r"header|does not list column 7") as error:
            schema.encode(table)
        assert "SECRET" not in str(error.value)
        assert "39" not in str(error.value)


@pytest.mark.untyped
def test_what_is_no_table_is_refused():
    schema = Schema.from_dict({"columns": GOOD})
    with pytest.raises(TypeError, match="columns by name"):
        schema.encode([[1, 2], [3, 4]])

    class Twice(dict):
        def keys(self):
            return [*super().keys(), "age"]

    with pytest.raises(ValueError, match="the same name"):
        schema.encode(Twice(TABLE))
