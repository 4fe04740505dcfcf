"""A small table that tests synthesize, and its schema."""

import numpy as np

SCHEMA = {
    "columns": {
        "group": {"type": "categorical", "values": ["x", "y", "z"]},
        "sick": {"type": "categorical", "values": ["0", "1"]},
        "visits": {"type": "integer", "range": [0, 7], "bins": 8},
        "paid": {"type": "categorical", "values": ["0", "1"]},
    }
}


def simulate(seed, rows):
    """Draws a table: group -> sick -> visits -> paid."""
    rng = np.random.default_rng(seed)
    group = rng.choice(3, rows, p=[0.5, 0.3, 0.2])
    sick = (rng.random(rows) < np.array([0.2, 0.5, 0.8])[group]).astype(int)
    visits = rng.binomial(7, np.array([0.3, 0.6])[sick])
    paid = (rng.random(rows) < np.array([0.3, 0.7])[(visits > 3).astype(int)]).astype(int)
    return {"group": np.array(["x", "y", "z"])[group], "sick": sick, "visits": visits, "paid": paid}


def numbers(table):
    """The columns of a real or synthetic table as numbers."""
    group = np.array(["xyz".index(value) for value in table["group"]])
    return group, *(np.array(table[name]).astype(int) for name in ("sick", "visits", "paid"))


def estimates(table):
    """Ten estimates and their variances, `(10, 2)`: shares, means, and differences of these."""
    group, sick, visits, paid = numbers(table)

    def mean(values):
        return np.array([values.mean(), values.var() / len(values)])

    def difference(first, second):
        return mean(first) * [1, 1] - mean(second) * [1, -1]

    return np.stack(
        [
            *(mean(group == 0), mean(sick), mean(visits), mean(paid)),
            *(mean(sick[group == 0]), mean(sick[group == 2]), mean(visits[sick == 1])),
            difference(visits[sick == 1], visits[sick == 0]),
            difference(paid[visits > 3], paid[visits <= 3]),
            difference(sick[group == 2], sick[group == 0]),
        ]
    )
