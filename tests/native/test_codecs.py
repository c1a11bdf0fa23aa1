"""The library's codecs: the sizes that the plan counts with, errors within the format's step, ggml's own bytes."""

import ctypes

import numpy as np
import pytest
import reference
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from kvtuner_gguf import native
from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.errors import CodecError

pytestmark = pytest.mark.native

every_type = pytest.mark.parametrize("name", CODECS)
group_types = pytest.mark.parametrize("name", [name for name, c in CODECS.items() if c.groups])
one_step_types = pytest.mark.parametrize(
    "name", [name for name, c in CODECS.items() if not c.groups and name not in reference.RINGS]
)
quantized_types = pytest.mark.parametrize("name", [name for name, c in CODECS.items() if c.block_size > 1])
RMS_ERROR = {
    **{"q6_32": 0.0204, "q3_32": 0.164, "q3_64": 0.176, "q2_32": 0.347, "q2_64": 0.356},
    **{"k5_64": 0.097, "k4_64": 0.175, "k3_64": 0.334, "k2_64": 0.448},
    **{"t4_64": 0.079, "t3_64": 0.152, "t2_64": 0.298},
}
"""Our types: relative RMS error on normal values that they must not exceed. Measured: .0202, .1628, .1747, .3448,
.3543, .0967, .1730, .3315, .4449, .0784, .1510, .2976."""
GROUP_ERROR = {
    "k5_64": (0.0001, 0.0024, 0.0079, 0.028),
    "k4_64": (0.0003, 0.0075, 0.0255, 0.088),
    "k3_64": (0.001, 0.027, 0.089, 0.33),
    "k2_64": (0.0077, 0.0915, 0.36, 0.34),
}
"""Mean squared error of the four groups, of values of variance 1. Measured: .0001 .0023 .0078 .0272, .0003 .0073 .0252
.0870, .0010 .0266 .0879 .3241, .0075 .0903 .3568 .3371."""
LARGEST_ERROR = {"k5_64": 0.06, "k4_64": 0.06, "k3_64": 0.067, "k2_64": 0.13}
"""Of a value far above all others in the first group, relative: rounding the scale may take a sixteenth. Measured:
.0583, .0583, .0657, .1289."""
LENGTH = {"k3_64": (0.99, 0.98, 0.95, 0.91), "k2_64": (0.99, 0.97, 0.90, 0.88)}
"""Of the groups of K, whose error matters more than their length where they have few bits. Measured: 1.00 .99 .96 .92,
1.00 .98 .91 .89."""

NUMBERS = {
    "q2_64": 200,
    "q2_32": 201,
    "q3_64": 202,
    "q3_32": 203,
    "q6_32": 204,
    "k2_64": 205,
    "k3_64": 206,
    "k4_64": 207,
    "t2_64": 208,
    "t3_64": 209,
    "t4_64": 210,
    "k5_64": 211,
}

our_types = pytest.mark.parametrize("name", RMS_ERROR)
WIDEST = 64  # a multiple of every block

F16, BF16 = 2.0**-11, 2.0**-8  # half a unit in the last place, relative: what rounding a value or a scale costs
# Largest error in a block, of types with one step, as (share of its largest magnitude, share of its range max - min):
# half a step, but a whole one where the format has one code less on one side (q5_0: -16..15, q4_0: -8..7), plus the
# rounding of scale and minimum.
BOUNDS = {
    "f32": (0, 0),
    "f16": (F16, 0),
    "bf16": (BF16, 0),
    "q8_0": (0.5 / 127 + F16, 0),
    "q5_1": (F16, 0.5 / 31 + F16),
    "q5_0": (1 / 16 + F16, 0),
    "q4_1": (F16, 0.5 / 15 + F16),
    "q4_0": (1 / 8 + F16, 0),
    # a scale that is fitted to the whole block may give up its largest value, but errs by no more than that
    "q6_32": (1.5 / 32 + F16, 0),
    # a scale that keeps the block's energy makes a value too long by as much as others are too short
    **dict.fromkeys(("q3_32", "q3_64", "q2_32", "q2_64"), (1, 0)),
    "iq4_nl": (0.15, 0),  # its codes are not evenly spaced and its scale is fitted: 0.137 measured, over 80,000 blocks
}


def values(seed=0, n_rows=64, n_per_row=192):
    return np.random.default_rng(seed).standard_normal((n_rows, n_per_row), dtype=np.float32)


def of_blocks(name, x):
    """(n_rows, n_blocks, block_size); types without blocks as if they had 32."""
    return x.reshape(len(x), -1, max(32, CODECS[name].block_size))


def bound(name, x):
    """The largest error of each block of x: (n_rows, n_blocks, 1)."""
    blocks = of_blocks(name, x)
    of_amax, of_range = BOUNDS[name]
    return of_amax * np.abs(blocks).max(axis=-1, keepdims=True) + of_range * np.ptp(blocks, axis=-1, keepdims=True)


def test_library_has_the_types_of_the_table():
    assert native.type_names() == tuple(CODECS)


@every_type
@pytest.mark.parametrize("n_values", [WIDEST, 2 * WIDEST, 30 * WIDEST])
def test_a_row_has_the_bytes_that_the_table_says(name, n_values):
    assert native.encode(name, np.ones((3, n_values))).shape == (3, CODECS[name].row_bytes(n_values))


@one_step_types
def test_round_trip_errs_by_less_than_the_step(name):
    x = values()
    error = of_blocks(name, np.abs(x - native.round_trip(name, x)))
    assert (error <= bound(name, x)).all()


@our_types
def test_normal_values_err_by_no_more_than_the_format_is_for(name):
    x = values(seed=5, n_rows=2000)
    assert np.square(x - native.round_trip(name, x)).sum() <= RMS_ERROR[name] ** 2 * np.square(x).sum()


@group_types
def test_the_first_group_is_the_most_precise(name):
    x = values(seed=5, n_rows=2000)
    error = np.square(x - native.round_trip(name, x)).reshape(-1, 4, 16).mean(axis=(0, 2))
    assert (error <= GROUP_ERROR[name]).all()


@group_types
def test_a_large_value_of_the_first_group_is_not_cut_off(name):
    x = values(seed=5, n_rows=2000, n_per_row=64)
    large = np.linspace(5, 10, 2000)  # where the levels of a block of normal values end at 3.4 of its rms
    x[:, 0] = np.where(x[:, 0] < 0, -large, large)
    assert (np.abs(x - native.round_trip(name, x))[:, 0] / large).max() <= LARGEST_ERROR[name]


@pytest.mark.parametrize("name", [name for name in RMS_ERROR if name != "q6_32"])
def test_low_bits_do_not_make_values_shorter(name):
    """Attention averages errors away, but not a bias."""
    x = values(seed=9, n_rows=2000)
    kept = (x * native.round_trip(name, x)).reshape(-1, 4, 16).sum(axis=(0, 2))
    kept /= np.square(x).reshape(-1, 4, 16).sum(axis=(0, 2))
    if name in LENGTH:
        assert (LENGTH[name] < kept).all() and (kept < 1.01).all()
    else:
        assert abs(kept.mean() - 1) < 0.01  # with the scale of the least squared error: .88 at 2 bits, .965 at 3


@every_type
def test_zeros_stay_zeros(name):
    assert not native.round_trip(name, np.zeros((2, 64))).any()


@one_step_types
@pytest.mark.parametrize("value", [1.0, -3.7, 250.0])
def test_a_constant_block_keeps_its_value(name, value):
    x = np.full((2, 64), value, dtype=np.float32)
    rounding = {"f32": 0, "bf16": BF16}.get(name, F16)  # of the scale alone: the value itself is a code
    assert np.abs(native.round_trip(name, x) - x).max() <= rounding * abs(value)


@every_type
def test_an_outlier_costs_its_own_block_only(name):
    x = values(seed=1, n_rows=4)
    before = native.round_trip(name, x)
    x[:, 70] = 1000.0
    after = native.round_trip(name, x)
    others = np.arange(x.shape[1]) // CODECS[name].block_size != 70 // CODECS[name].block_size
    assert np.array_equal(before[:, others], after[:, others])
    assert name not in BOUNDS or (of_blocks(name, np.abs(x - after)) <= bound(name, x)).all()


@every_type
def test_rows_do_not_depend_on_each_other(name):
    x = values(seed=2, n_rows=3)
    assert np.array_equal(native.encode(name, x)[1], native.encode(name, x[1:2])[0])


@quantized_types
def test_a_row_of_broken_blocks_is_refused(name):
    with pytest.raises(CodecError, match=rf"{name}: a row of 33 values.* block of {CODECS[name].block_size}"):
        native.encode(name, np.zeros((1, 33)))
    with pytest.raises(CodecError, match=rf"{name}: a row of 33 values"):
        native.decode(name, np.zeros((1, 34), dtype=np.uint8), 33)


@every_type
def test_bytes_of_another_row_length_are_refused(name):
    n_bytes = CODECS[name].row_bytes(128)
    with pytest.raises(CodecError, match=f"{name}: {n_bytes} bytes per row, 64 values need {n_bytes // 2}"):
        native.decode(name, np.zeros((1, n_bytes), dtype=np.uint8), 64)


@every_type
def test_an_empty_row_is_refused(name):
    with pytest.raises(CodecError, match=f"{name}: a row of 0 values"):
        native.encode(name, np.zeros((1, 0)))


@pytest.mark.parametrize("name", ["q4_2", "", "Q8_0", "q8_0 ", "q6_K", "q2_0"])
def test_a_type_that_is_no_cache_type_is_refused(name):
    with pytest.raises(CodecError, match=f"'{name}' is not the name of a cache type"):
        native.encode(name, np.zeros((1, 32)))


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])  # the package has no quantizer of iq4_nl
def test_bytes_are_those_of_the_gguf_package(name):
    x = values(seed=3)
    assert np.array_equal(native.encode(name, x), quantize(x, GGMLQuantizationType[name.upper()]))


@pytest.mark.parametrize("name", [name for name, c in CODECS.items() if c.block_size > 1 and name not in RMS_ERROR])
def test_values_are_those_of_the_gguf_package(name):
    data = native.encode(name, values(seed=4))
    assert np.array_equal(native.decode(name, data, 192), dequantize(data, GGMLQuantizationType[name.upper()]))


def hard_values():
    """Rows of 64 that end a scale's range, or begin where it ends: NaN, infinities, what f16 cannot hold, ties, zeros
    of both signs."""
    x = values(seed=6, n_rows=40, n_per_row=64)
    x[0], x[1], x[2], x[3] = 0.0, -0.0, np.nan, np.inf
    x[4, 5], x[5, 5], x[6, 5], x[7, 5] = np.nan, np.inf, -np.inf, 3e38
    x[8] *= 1e-8
    x[9] *= 1e-41
    x[10] *= 1e5
    x[11] = np.where(x[11] < 0, -1.0, 1.0)
    x[12] = np.arange(64) - 31.5
    x[13] = np.arange(64) - 32.0
    x[14] = np.round(x[14] * 4) / 4
    x[15] = np.abs(x[15])
    x[16, 1:] = 0.0
    x[17, :63] = -1e-30
    for group in range(4):  # all of a block's energy, as high costs as a way may have
        x[18 + group, np.arange(64) // 16 != group] = 0.0
        x[22 + group] = np.where(np.arange(64) // 16 == group, np.sign(x[22 + group]), 0.0)
    x[26] = np.where(np.arange(64) % 16 == 0, x[26] * 1e3, x[26])
    return x


@our_types
@pytest.mark.parametrize("x", [values(seed=7, n_rows=500), hard_values()], ids=["normal", "hard"])
def test_bytes_of_our_types_are_the_references(name, x):
    assert np.array_equal(native.encode(name, x), reference.quantize(name, x))


@our_types
def test_values_of_our_types_are_the_references(name):
    data = np.random.default_rng(8).integers(0, 256, (50, CODECS[name].row_bytes(192)), dtype=np.uint8)
    block = data.reshape(-1, CODECS[name].type_size)
    # an exponent below 16: no NaN, no infinity
    block[:, reference.scale_bytes(name) - 1] &= 0x7F if reference.scale_bytes(name) == 1 else 0xBF
    assert np.array_equal(native.decode(name, data, 192), reference.dequantize(name, data))


@our_types
def test_no_value_makes_a_scale_infinite(name):
    assert np.isfinite(native.round_trip(name, hard_values())).all()


@our_types
@pytest.mark.parametrize(("scale", "valid"), [(np.nan, False), (np.inf, False), (0.5, True)])
def test_a_row_whose_scale_is_no_number_is_not_valid(name, scale, valid):
    data = native.encode(name, values(seed=3, n_rows=1)[:, :192]).reshape(-1, CODECS[name].type_size)
    d = reference.stored(name, np.array([scale], np.float16))
    data[-1, : d.shape[1]] = d
    row = np.ascontiguousarray(data)
    asked = native.type_number(name), ctypes.c_void_p(row.ctypes.data), ctypes.c_size_t(row.nbytes)
    assert bool(native.library().ggml_validate_row_data(*asked)) is valid


@every_type
def test_every_type_has_a_number_of_ggml(name):
    assert native.type_number(name) == NUMBERS.get(name) or native.type_number(name) < 43
