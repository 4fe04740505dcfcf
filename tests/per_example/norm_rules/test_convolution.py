"""Norm rules for convolutions."""

import functools

import jax
import jax.numpy as jnp
import pytest
from rule_laws import check_laws, floats, sites_of

from dpoptax.per_example._norm_rules import cost_model
from dpoptax.per_example._norm_rules.convolution import ConvolutionPatches, ConvolutionPixelGram

CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
BOTH = (ConvolutionPatches, ConvolutionPixelGram)


def convolution(w, x, strides=(1, 1), padding="SAME", numbers=CHANNELS_LAST, **options):
    output = jax.lax.conv_general_dilated(
        x[None], w, strides, padding, dimension_numbers=numbers, **options
    )
    return jnp.sum(jnp.tanh(output))


def of(**options):
    return functools.partial(convolution, **options)


def over_time(w, x):
    return convolution(w, x, (2,), "SAME", ("NWC", "WIO", "NWC"))


def over_frames(w, x):
    output = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST)
    return jnp.sum(jnp.tanh(output))


def inside_a_scan(w, x):
    return jnp.sum(jax.lax.map(lambda frame: convolution(w, frame), x))


def used_twice(w, x):
    return convolution(w, x) + convolution(w, 2 * x)


KINDS = {
    "same": (of(), (3, 3, 2, 4), floats(5, 4, 2)),
    "valid": (of(padding="VALID"), (2, 3, 2, 4), floats(5, 4, 2)),
    "strides": (of(strides=(2, 3), padding="VALID"), (3, 2, 2, 4), floats(7, 8, 2)),
    "dilated kernel": (of(rhs_dilation=(2, 1)), (3, 3, 2, 4), floats(6, 5, 2)),
    "dilated input": (
        of(lhs_dilation=(2, 2), padding=((1, 2), (2, 1))), (3, 3, 2, 4), floats(4, 3, 2)
    ),
    "channels first": (
        of(numbers=("NCHW", "OIHW", "NCHW")), (4, 2, 3, 3), floats(2, 5, 4)
    ),
    "one axis, long window": (over_time, (20, 2, 3), floats(30, 2)),
    "frames": (over_frames, (3, 2, 2, 4), floats(2, 4, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        pytest.param(*kind, id=name, marks=() if name == "frames" else pytest.mark.slow)
        for name, kind in KINDS.items()
    ],
)
def test_patches_and_pixel_grams_obey_the_laws(loss_fn, shape, example):
    use = sites_of(loss_fn, shape, example)
    check_laws(*(rule.matches(*use) for rule in BOTH))


def test_groups_are_left_to_patches():
    use = sites_of(of(feature_group_count=2), (3, 3, 2, 4), floats(5, 4, 4))
    check_laws(ConvolutionPatches.matches(*use))
    assert ConvolutionPixelGram.matches(*use) is None


def test_a_window_may_be_looked_up_or_sliced(monkeypatch):
    use = sites_of(of(strides=(2, 1), rhs_dilation=(1, 2)), (3, 3, 2, 4), floats(6, 7, 2))
    monkeypatch.setattr(cost_model, "MAX_SLICED_WINDOW", 0)
    check_laws(ConvolutionPatches.matches(*use))


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (inside_a_scan, (3, 3, 2, 4), floats(2, 5, 4, 2)),
        (used_twice, (3, 3, 2, 4), floats(5, 4, 2)),
        (lambda w, x: jnp.sum(jnp.tanh(x @ w)), (4, 3), floats(2, 4)),
        (lambda w, x: convolution(jnp.repeat(w, 2, axis=3), x), (3, 3, 2, 2), floats(5, 4, 2)),
    ],
    ids=["scan", "two uses", "product", "repeated kernel"],
)
def test_other_uses_are_refused(rule, loss_fn, shape, example):
    assert rule.matches(*sites_of(loss_fn, shape, example)) is None


def test_pixel_grams_are_cheaper_for_small_images_with_many_channels():
    def costs(side, channels):
        shape, example = (3, 3, channels, channels), floats(side, side, channels)
        return [rule.matches(*sites_of(of(), shape, example)).cost for rule in BOTH]

    patches, gram = costs(4, 256)
    assert gram < patches
    patches, gram = costs(32, 8)
    assert patches < gram
