"""Data as people have them: each kind works, or is refused with its column and the remedy."""

import collections
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import DeviceData, HostData, fit
from dpoptax.training._data import as_training_data

N = 12
X = np.arange(2.0 * N, dtype=np.float32).reshape(N, 2)
Y = np.arange(N) % 3
SECRET = "31337 Elm Street"
Row = collections.namedtuple("Row", "x y")


class Source:
    """A data set with random access, as PyTorch, Grain and Hugging Face have them."""

    def __init__(self, row=lambda i: {"x": X[i], "y": int(Y[i])}, size=N):
        self.row, self.size = row, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError
        return self.row(index)


class Batched(Source):
    """Reads many rows at once, and counts how often."""

    reads = 0

    def __getitems__(self, indices):
        self.reads += 1
        return [self[index] for index in indices]


class Loader:
    """A stand-in for `torch.utils.data.DataLoader`."""

    def __init__(self, dataset, batch_size=4):
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def __iter__(self):
        raise AssertionError("it must not be read")


class TfData:
    """A stand-in for `tf.data.Dataset`."""

    element_spec = None

    def __iter__(self):
        raise AssertionError("it must not be read")

    as_numpy_iterator = __len__ = __iter__


class Series:
    """A stand-in for a column of pandas or polars."""

    def __init__(self, values):
        self.values, self.dtype, self.shape = values, "extension", np.shape(values)

    def to_numpy(self):
        return np.asarray(self.values)


class Frame:
    """A stand-in for a data frame of pandas or polars."""

    def __init__(self, columns):
        self.data, self.columns, self.dtypes = columns, list(columns), None
        self.shape = (N, len(columns))

    def __getitem__(self, name):
        return Series(self.data[name])

    def __len__(self):
        return N

    def to_numpy(self):
        raise AssertionError("its columns may have several types")


class Arrow:
    """A stand-in for `pyarrow.Table`: indexed by a number it gives a column."""

    def __init__(self, columns):
        self.data, self.column_names = columns, list(columns)

    def __getitem__(self, index):
        return self.column(self.column_names[index])

    def __len__(self):
        return N

    def column(self, name):
        return Series(self.data[name])

    to_pydict = None


class Tensor:
    """A stand-in for `torch.Tensor`: shape and dtype, and NumPy can read it."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, "torch.float32"

    def __array__(self, dtype=None, copy=None):
        if self.values is X:
            raise RuntimeError("call detach first")
        return np.asarray(self.values, dtype)


class Mapped(collections.UserDict):
    """A mapping that JAX does not know, such as an open .npz file."""


def structured():
    table = np.zeros(N, [("x", np.float32, (2,)), ("y", np.int32)])
    table["x"], table["y"] = X, Y
    return table


def objects(rows):
    """One array of objects with a row each, as a frame holds images."""
    column = np.empty(len(rows), object)
    column[:] = list(rows)
    return column


ROWS = [{"x": X[i].tolist(), "y": int(Y[i])} for i in range(N)]
COLUMNS = {"x": X, "y": Y}
GOOD = {
    "arrays": COLUMNS,
    "lists in columns": {"x": X.tolist(), "y": Y.tolist()},
    "rows of lists": ROWS,
    "rows of arrays": [{"x": X[i], "y": Y[i]} for i in range(N)],
    "rows of mappings": [Mapped(row) for row in ROWS],
    "structured array": structured(),
    "frame": Frame({"x": list(X), "y": Y}),
    "frame of objects": Frame({"x": objects(X), "y": Y.astype(object)}),
    "arrow table": Arrow({"x": X, "y": Y}),
    "mapping": Mapped(COLUMNS),
    "tensors": {"x": Tensor(X + 0), "y": Tensor(Y)},
    "series": {"x": X, "y": Series(Y)},
    "source": Source(),
    "source of lists": Source(lambda i: ROWS[i]),
    "source of structured rows": Source(lambda i: structured()[i]),
    "source with batched reads": Batched(),
}


@pytest.mark.parametrize("wrap", [as_training_data, HostData])
@pytest.mark.parametrize("kind", GOOD)
def test_data_of_this_kind_are_read_by_column(kind, wrap):
    data = wrap(GOOD[kind])
    assert len(data) == N
    chosen = np.array([5, 0, 5])
    rows = (
        data.rows(chosen)
        if isinstance(data, HostData)
        else jax.tree.map(lambda leaf: leaf[chosen], data.arrays)
    )
    np.testing.assert_array_equal(rows["x"], X[chosen])
    np.testing.assert_array_equal(rows["y"], Y[chosen])
    assert data.first_example()["x"].shape == (1, 2)


def test_a_tuple_has_columns_and_a_list_has_rows():
    pair = as_training_data((X, Y))
    rows = as_training_data([Row(*row) for row in zip(X, Y, strict=True)])
    lists = as_training_data([list(row) for row in zip(X, Y, strict=True)])
    assert isinstance(rows.arrays, Row)
    for data in (pair, rows, lists):
        np.testing.assert_array_equal(data.arrays[0], X)
        np.testing.assert_array_equal(data.arrays[1], Y)
    assert len(as_training_data([1.0, 2.5])) == 2
    assert as_training_data([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).arrays.shape == (2, 3)
    assert len(as_training_data([X[0], X[1], X[2]])) == 3
    # One column as long as the other: they are no rows of one shape.
    with pytest.raises(ValueError, match="data must have one shape in every example"):
        as_training_data([X, Y])


def test_a_source_with_batched_reads_is_asked_once_per_batch():
    source = Batched()
    data, before = HostData(source), source.reads
    data.rows(np.arange(8))
    assert source.reads == before + 1

    class Wrong(Source):
        def __getitems__(self, indices):
            return {"x": X[indices]}

    with pytest.raises(TypeError, match="must return a list with one example per index"):
        HostData(Wrong())


BAD = {
    "string column": ({"x": X, "t": np.array([SECRET] * N)}, r"data\['t'\] .* got strings"),
    "list of strings": ({"x": X, "t": [SECRET] * N}, r"data\['t'\] .* got text"),
    "rows with text": ([{"x": 1.0, "t": SECRET}] * N, r"data\['t'\] .* got text\. Leave the"),
    "source with text": (Source(lambda i: {"t": SECRET}), r"data\['t'\] .* text into token ids"),
    "frame with text": (Frame({"x": X, "t": [SECRET] * N}), r"data\['t'\] .* got strings"),
    "structured text": (np.zeros(N, [("t", "U5")]), r"data\['t'\] .* got strings"),
    "missing values": ({"x": np.array([1, None] * 6)}, r"data\['x'\] .* missing values into"),
    "dates": ({"d": np.zeros(N, "datetime64[D]")}, r"data\['d'\] .* got dates\. Turn them"),
    "ragged lists": ({"x": [[1.0], [1.0, 2.0]]}, r"data\['x'\] must have one shape.*Pad"),
    "ragged rows": ([{"x": [1.0]}, {"x": [1.0, 2.0]}], r"data\['x'\] must have one shape.*Pad"),
    "ragged row": ([{"x": [[1.0], [1.0, 2.0]]}], r"data\['x'\] must have one shape; got a list"),
    "rows with other fields": ([{"x": 1.0}, {"y": 1.0}], "the same fields in every example"),
    "None for an example": (Source(lambda i: None), "got None. Remove the rows that are filtered"),
    "generator": ((row for row in ROWS), r"got a generator\. Index, do not iterate"),
    "iterator in a column": ({"x": iter(ROWS)}, r"data\['x'\] .* got a list_iterator"),
    "data loader": (Loader(Source()), r"draws and shuffles batches .*HostData\(loader\.dataset\)"),
    "tf.data": (TfData(), r"tf\.data TfData, which is a stream\. Index, .*tfds\.data_source"),
    "data sets by name": ({"train": Source()}, r"data\['train'\] .* Pass one data set alone"),
    "tensor with a gradient": ({"x": Tensor(X)}, r"data\['x'\] .*\(RuntimeError\)\. Convert it"),
    "large ids": ({"id": np.array([31337 << 20] * N)}, r"data\['id'\] must .* 32 bits.*Renumber"),
    "path": ("train.csv", "data must be arrays; got a string"),
    "no rows": ([], "must have at least one example"),
    "other lengths": ({"x": X, "y": Y[:5]}, r"data\['x'\]: 12, data\['y'\]: 5"),
    "a scalar": ({"x": X, "temperature": 0.5}, r"data\['temperature'\], which is a scalar"),
    "a name twice": (Frame({"x": X}), "one name per column"),
}
BAD["a name twice"][0].columns = ["x", "x"]


@pytest.mark.parametrize("kind", BAD)
def test_data_of_this_kind_are_refused_before_anything_is_computed(kind):
    data, match = BAD[kind]

    def loss_fn(params, example):
        raise AssertionError("the loss was traced")

    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(N, 4), clip=1.0, noise_multiplier=1.0, num_steps=1,
        delta=1e-3,
    )  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=match) as error:
        fit(loss_fn, jnp.zeros(2), data, plan=plan, optimizer=optax.sgd(0.1), progress=False)
    assert "31337" not in str(error.value)
    assert len(str(error.value)) < 400
    wrap = HostData if hasattr(data, "__getitem__") and isinstance(data, Source) else DeviceData
    with pytest.raises((TypeError, ValueError), match=match):
        wrap(data)


def test_a_source_whose_later_rows_differ_is_refused_by_column():
    grows = HostData(Source(lambda i: {"x": X[i], "y": np.zeros(1 + i // 5)}))
    with pytest.raises(ValueError, match=r"data\['y'\] must have one shape in every example"):
        grows.rows(np.arange(N))
    floats = HostData(Source(lambda i: {"y": 0 if i < 5 else 0.5}))
    assert floats.rows(np.arange(5))["y"].dtype == np.int64
    with pytest.raises(ValueError, match=r"data\['y'\] must have one type.*Convert the column"):
        floats.rows(np.arange(N))
    whole = HostData(Source(lambda i: {"y": 0.5 if i < 5 else 1}))
    assert whole.rows(np.array([7, 8]))["y"].dtype == np.float64


def test_device_data_does_not_read_a_source():
    with pytest.raises(TypeError, match=r"DeviceData needs arrays; .*Pass HostData\(source\)"):
        DeviceData(Source())


def test_files_that_read_in_rising_order_are_read_so():
    class Rising:
        """A stand-in for a data set of an HDF5 file."""

        shape, dtype = X.shape, X.dtype

        def __getitem__(self, index):
            assert isinstance(index, slice) or (np.diff(index) > 0).all()
            return X[index]

        def __len__(self):
            return N

    np.testing.assert_array_equal(HostData(Rising()).rows(np.array([5, 0, 5])), X[[5, 0, 5]])


@pytest.mark.slow
def test_columns_of_every_kind_train_the_same_model():
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(N, 4), clip=1.0, noise_multiplier=1.0, num_steps=2,
        delta=1e-3,
    )  # fmt: skip

    def train(data):
        return fit(
            lambda w, row: jnp.sum((w - row["x"]) ** 2) * row["y"].astype(jnp.float32),
            jnp.zeros(2), data,
            plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False,
        ).params  # fmt: skip

    expected = train(COLUMNS)
    for kind in ("rows of lists", "frame", "source with batched reads"):
        np.testing.assert_allclose(train(GOOD[kind]), expected, rtol=1e-6, err_msg=kind)


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="needs pandas")
def test_the_real_pandas():
    import pandas

    frame = pandas.DataFrame({"x": X[:, 0], "y": pandas.array(Y, dtype="Int64")})
    np.testing.assert_array_equal(as_training_data(frame).arrays["y"], Y)
    frame["t"] = SECRET
    with pytest.raises(TypeError, match=r"data\['t'\] .* got strings"):
        as_training_data(frame)
    frame["t"] = frame["t"].astype("category")
    with pytest.raises(TypeError, match=r"data\['t'\] .* got strings"):
        as_training_data(frame)


def test_the_real_grain():
    grain = pytest.importorskip("grain")
    rows = grain.MapDataset.source(ROWS)
    assert len(as_training_data(rows)) == N
    np.testing.assert_array_equal(as_training_data(rows).rows(np.array([3]))["x"], X[[3]])
    with pytest.raises(TypeError, match="Index, do not iterate"):
        as_training_data(rows.to_iter_dataset())
    with pytest.raises(TypeError, match="got None"):
        as_training_data(rows.filter(lambda row: row["y"] > 0))
