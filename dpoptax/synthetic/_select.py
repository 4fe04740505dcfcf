"""Which two-way tables to count: the pairs of columns that the model describes worst.

All pairs get a score, the L1 distance between the counts and those of the model, with noise. One
row moves a score by at most one. Choosing by noisy scores is post-processing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

Pair = tuple[str, str]


def all_pairs(names: Sequence[str]) -> list[Pair]:
    """Returns all pairs of columns."""
    return list(itertools.combinations(names, 2))


def spanning_tree(names: Sequence[str], gains: Mapping[Pair, float]) -> list[Pair]:
    """Returns the pairs of the maximum spanning tree (Kruskal 1956)."""
    root = {name: name for name in names}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    tree = []
    for pair in sorted(gains, key=lambda pair: -gains[pair]):
        first, second = map(find, pair)
        if first != second:
            root[first] = second
            tree.append(pair)
    return tree


def gains(scores: Sequence[float], sizes: Sequence[int], stddev: float, total: float) -> np.ndarray:
    """Returns how much closer each table would come to the data if it were counted.

    The score is the error of the model, in rows. What a count adds is the noise of its cells. The
    error of a table of n cells is at most that of rounding it down to zero, `total`.

    Reference: McKenna et al. 2022, "AIM", arXiv:2201.12677, equation 1.
    """
    noise = math.sqrt(2 / math.pi) * stddev * np.asarray(sizes, float)
    return np.asarray(scores, float) - np.minimum(noise, total)
