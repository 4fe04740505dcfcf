"""Receiver operating characteristic (ROC) of an attack, with exact binomial intervals."""

from typing import NamedTuple

import numpy as np
import scipy.special


class Roc(NamedTuple):
    """True and false positive rates of an attack at all thresholds, from strict to lenient.

    The intervals hold for each threshold, and for both rates together, if the scores are
    independent.

    Attributes:
        false_positive_rates: part of the canaries that were out and are said to be in.
        true_positive_rates: part of the canaries that were in and are said to be in.
        false_positive_low: lower ends of the intervals.
        false_positive_high: upper ends.
        true_positive_low: lower ends.
        true_positive_high: upper ends.
    """

    false_positive_rates: np.ndarray
    true_positive_rates: np.ndarray
    false_positive_low: np.ndarray
    false_positive_high: np.ndarray
    true_positive_low: np.ndarray
    true_positive_high: np.ndarray


def roc(in_scores: np.ndarray, out_scores: np.ndarray, confidence: float) -> Roc:
    """Returns the rates of the attacks that say "in" from a threshold on."""
    thresholds = np.unique(np.concatenate([in_scores, out_scores]))[::-1]
    # First nobody, then one more distinct score at a time.
    found = [0, *_at_least(in_scores, thresholds)]
    wrong = [0, *_at_least(out_scores, thresholds)]
    tail = (1 - confidence) / 4
    true_low, true_high = _interval(np.array(found), len(in_scores), tail)
    false_low, false_high = _interval(np.array(wrong), len(out_scores), tail)
    return Roc(
        np.array(wrong) / len(out_scores),
        np.array(found) / len(in_scores),
        false_low,
        false_high,
        true_low,
        true_high,
    )


def _at_least(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def _interval(counts: np.ndarray, total: int, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided Clopper-Pearson intervals, with this probability beyond each end."""
    low = scipy.special.betaincinv(np.maximum(counts, 1), total - counts + 1, tail)
    high = scipy.special.betaincinv(counts + 1, np.maximum(total - counts, 1), 1 - tail)
    return np.where(counts == 0, 0.0, low), np.where(counts == total, 1.0, high)
