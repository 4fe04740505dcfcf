"""Private synthetic data from a table and its public schema."""

import csv
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.accounting import calibrate_noise_multiplier
from dpoptax.random._derive import derive_key, fingerprint, split_by_purpose
from dpoptax.random._keys import root_key
from dpoptax.reports import Report
from dpoptax.samplers import Poisson
from dpoptax.synthetic import _model, _pictures, _vae
from dpoptax.synthetic._columns import Column, Encoded
from dpoptax.synthetic._draws import Draws
from dpoptax.synthetic._marginals import Measured, measure
from dpoptax.synthetic._privacy import report_of
from dpoptax.synthetic._releases import Releases
from dpoptax.synthetic._schema import Schema
from dpoptax.synthetic._sets import draw_sets
from dpoptax.synthetic._utility import Utility, utility_of

METHODS = ("marginals", "vae")
REPORT_FILE = "privacy_report.json"


@attrs.frozen(eq=False, kw_only=True)
class SyntheticData:
    """Synthetic tables and the reports on them; what `synthesize` returns.

    Attributes:
        sets: the synthetic tables, each a dict of columns: lists of texts and numbers, with None
            for missing values.
        report: the privacy report of the run.
        utility: how close the first set is to what was released; None for `method="vae"`.
        measured: the noisy tables and the model; None for `method="vae"`.

    Example:
        >>> from dpoptax.synthetic import synthesize
        >>> kind = {"type": "categorical", "values": ["a", "b"]}
        >>> table = {"one": ["a", "b"] * 500, "two": ["b", "a"] * 500}
        >>> made = synthesize(table, {"columns": {"one": kind, "two": kind}}, epsilon=1, delta=1e-5)
        >>> sorted(set(made.sets[0]["one"])), made.report.epsilon <= 1.0
        (['a', 'b'], True)
    """

    sets: list[dict[str, list[Any]]]
    report: Report
    utility: Utility | None = None
    measured: Measured | None = attrs.field(default=None, repr=False)
    _cells: dict[str, np.ndarray] = attrs.field(factory=dict, repr=False)

    def __repr__(self) -> str:
        """Leaves out the tables, which are long."""
        rows = len(next(iter(self.sets[0].values())))
        return f"SyntheticData({len(self.sets)} sets of {rows:,} rows, not shown)"

    def write(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes the sets as CSV files, and the reports.

        Args:
            folder: is made if it does not exist. Files of an earlier release in it are replaced:
                keep the reports of all releases, because all of them cost privacy.

        Returns:
            The paths: `synthetic_1.csv` and so on, `privacy_report.txt`, `privacy_report.json`, and
            `utility_report.txt` where there is one.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, table in enumerate(self.sets, 1):
            paths.append(folder / f"synthetic_{number}.csv")
            with paths[-1].open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(table)
                writer.writerows(
                    ["" if value is None else value for value in row]
                    for row in zip(*table.values(), strict=True)
                )
        texts = {
            "privacy_report.txt": str(self.report),
            REPORT_FILE: self.report.to_json(),
        }
        if self.utility is not None:
            texts["utility_report.txt"] = str(self.utility)
        for name, text in texts.items():
            paths.append(folder / name)
            paths[-1].write_text(text + "\n")
        return paths

    def save_pictures(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Draws the first set beside the noisy tables; nothing for `method="vae"`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if self.measured is None:
            return []
        return _pictures.save_pictures(self.measured, self._cells, pathlib.Path(folder))


def synthesize(
    table: Any,
    schema: Schema | Mapping[str, Any],
    *,
    epsilon: float,
    delta: float,
    num_sets: int = 1,
    num_rows: int | None = None,
    method: str = "marginals",
    target: str | None = None,
    key: PRNGKeyArray | None = None,
) -> SyntheticData:
    """Makes private synthetic data from a table.

    `method="marginals"` counts the cells of each column, compares all pairs of columns with a model
    of the counts so far, and counts those pairs that the model describes worst. Everything is an
    exact discrete Gaussian release, charged to one ledger. The model of maximum entropy that is
    closest to the noisy tables then gives the synthetic rows. It needs the package `mbi`. The
    guarantee is for adding or removing one row, and the number of rows is noisy too.

    `method="vae"` trains a variational autoencoder by private gradients. The number of rows is
    public for this method. It suits tables with many columns; on small tables, marginals are
    better.

    One set follows the noisy tables closely. Several sets also carry the uncertainty of the sample
    and of the noise: combine estimates from them by
    `dpoptax.vi.contrib.combine_synthetic_estimates`. The intervals hold for estimates that the
    counted tables determine. Sets of `method="vae"` do not carry the uncertainty of training.

    Args:
        table: columns by name: a dict of lists, or a data frame of pandas.
        schema: a `Schema`, or a dict for `Schema.from_dict`.
        epsilon: of the guarantee.
        delta: of the guarantee; well below 1 / rows.
        num_sets: how many synthetic tables to make; for intervals, ten or more.
        num_rows: how many rows each has; by default as many as the noisy counts say, and four
            times as many if there are several sets, which makes intervals more accurate.
        method: `"marginals"` or `"vae"`.
        target: a column that the data will be used to predict; its pairs are preferred.
        key: a typed key for tests; by default a secret one from the operating system.

    Returns:
        A `SyntheticData`.

    Raises:
        ImportError: `mbi` is not installed.
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the table does not fit the schema.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> work = rng.random(5000) < 0.6
        >>> table = {"work": np.where(work, "yes", "no"), "hours": 20 + 20 * work}
        >>> schema = {
        ...     "columns": {
        ...         "work": {"type": "categorical", "values": ["yes", "no"]},
        ...         "hours": {"type": "integer", "edges": [0, 20, 40, 60]},
        ...     }
        ... }
        >>> made = synthesize(table, schema, epsilon=1.0, delta=1e-6)
        >>> made.report.epsilon <= 1.0
        True
        >>> hours = np.array(made.sets[0]["hours"])[np.array(made.sets[0]["work"]) == "yes"]
        >>> bool(np.mean(hours >= 40) > 0.95)
        True

    Reference: McKenna et al. 2022, "AIM", arXiv:2201.12677; McKenna et al. 2021, "Winning the NIST
    contest", arXiv:2108.04978.
    """
    schema = schema if isinstance(schema, Schema) else Schema.from_dict(schema)
    number = _validate.count("num_sets", num_sets)
    if num_rows is not None:
        num_rows = _validate.count("num_rows", num_rows)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {_validate.described(method)}.")
    if target is not None and target not in schema.columns:
        raise ValueError("target must be one of the columns of the schema that are not left out.")
    # Before anything is charged.
    if method == "marginals":
        _model.import_mbi()
        found = calibrate_noise_multiplier(
            epsilon=epsilon, delta=delta, sampler=Poisson(1, 1), num_steps=1
        )
    encoded = schema.encode(table)
    secret = derive_key(root_key(key), _purpose(schema, encoded, epsilon, delta, method))
    rng = Draws(split_by_purpose(derive_key(secret, "synthetic rows")).model_key)
    if method == "vae":
        return _by_vae(schema, encoded, (number, num_rows), (epsilon, delta), secret, rng)
    releases = Releases(secret, delta)
    measured = measure(encoded, schema.columns, releases, found.noise_multiplier, rng, target)
    sets = draw_sets(measured, number, num_rows, rng)
    return SyntheticData(
        sets=[_decoded(schema.columns, cells, rng) for cells in sets],
        report=report_of(releases, measured.total, key),
        utility=utility_of(measured, sets[0]),
        measured=measured,
        cells=sets[0],
    )


def _by_vae(
    schema: Schema,
    encoded: Mapping[str, Encoded],
    size: tuple[int, int | None],
    budget: tuple[float, float],
    key: PRNGKeyArray,
    rng: Draws,
) -> SyntheticData:
    cells = {name: column.cells for name, column in encoded.items()}
    layout, params, report = _vae.train(cells, schema.columns, *budget, key)
    num_sets, num_rows = size
    rows = num_rows or len(next(iter(cells.values())))
    sets = []
    for number in range(num_sets):
        drawn = _vae.draw(layout, params, rows, derive_key(key, f"set {number}"))
        # The cell of a missing value is the last one.
        filled = np.where(drawn < 0, np.array(layout.sizes), drawn)
        by_name = dict(zip(schema.columns, filled.T, strict=True))
        sets.append(_decoded(schema.columns, by_name, rng))
    return SyntheticData(sets=sets, report=attrs.evolve(report, unit="row"))


def _decoded(
    columns: Mapping[str, Column], cells: Mapping[str, np.ndarray], rng: Draws
) -> dict[str, list[Any]]:
    return {name: column.decode(cells[name], rng) for name, column in columns.items()}


def _purpose(
    schema: Schema, encoded: Mapping[str, Encoded], epsilon: float, delta: float, method: str
) -> str:
    """Returns a text that differs for runs that differ, so that they never share noise."""
    digest = hashlib.sha256()
    for name, column in encoded.items():
        digest.update(name.encode() + b"\0" + column.counted.tobytes())
    settings = fingerprint(schema, float(epsilon), float(delta), method)
    return f"dpoptax synthesize {settings} {digest.hexdigest()}"
