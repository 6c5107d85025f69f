"""The table of reductions: what it has, what it refuses, and the values at its edges."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from collective.reductions import COMPLEX, FLOATS, HALVES, INTEGERS, REDUCIBLE, check, reduce_arrays
from collective.tensors import numpy_dtype
from collective.types import ReduceOp


def reduced(arrays: list[np.ndarray], op: ReduceOp) -> np.ndarray:
    out = np.empty_like(arrays[0])
    reduce_arrays(arrays, op, out)
    return out


def test_the_table_is_complete() -> None:
    allowed = set()
    for op, dtype in itertools.product(ReduceOp, REDUCIBLE):
        try:
            check(op, dtype)
        except TypeError:
            continue
        allowed.add((op, dtype))
    missing = set(itertools.product(ReduceOp, REDUCIBLE)) - allowed
    assert missing == {
        *itertools.product((ReduceOp.MIN, ReduceOp.MAX), COMPLEX),
        *itertools.product((ReduceOp.AVG,), ("bool", *INTEGERS)),
    }


def test_what_is_missing_is_said() -> None:
    with pytest.raises(TypeError, match="MAX of complex64: complex numbers have no order"):
        check(ReduceOp.MAX, "complex64")
    with pytest.raises(TypeError, match="AVG of int32 is not defined; reduce with SUM"):
        check(ReduceOp.AVG, "int32")


@pytest.mark.parametrize("dtype", ["<M8[s]", ">f4", "numpy:[('a', '<i4')]", "torch:bits8", "float8_e4m3fn", "|S3"])
def test_other_dtypes_are_refused_with_a_remedy(dtype: str) -> None:
    with pytest.raises(TypeError, match="cannot be reduced; convert"):
        check(ReduceOp.SUM, dtype)


def test_what_is_no_reduction_is_refused() -> None:
    with pytest.raises(TypeError, match=r"'sum'; pass one of ReduceOp\.SUM"):
        check("sum", "float32")  # type: ignore[arg-type]


def test_bool_sums_are_or_and_products_and() -> None:
    a, b = np.array([False, False, True, True]), np.array([False, True, False, True])
    assert reduced([a, b], ReduceOp.SUM).tolist() == (a | b).tolist()
    assert reduced([a, b], ReduceOp.MAX).tolist() == (a | b).tolist()
    assert reduced([a, b], ReduceOp.PROD).tolist() == (a & b).tolist()
    assert reduced([a, b], ReduceOp.MIN).tolist() == (a & b).tolist()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_wrap(dtype: str) -> None:
    top = np.full(3, np.iinfo(dtype).max, dtype)
    for op, combine in ((ReduceOp.SUM, lambda a, b: a + b), (ReduceOp.PROD, lambda a, b: a * b)):
        exact = int(top[0])
        for _ in range(2):
            exact = combine(exact, int(top[0]))
        bits = np.iinfo(dtype).bits
        wrapped = exact % 2**bits
        if np.iinfo(dtype).min < 0 and wrapped >= 2 ** (bits - 1):
            wrapped -= 2**bits
        assert reduced([top, top, top], op).tolist() == [wrapped] * 3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
def test_nan_wins_from_any_member(dtype: str, op: ReduceOp) -> None:
    for place in range(3):
        arrays = [np.array([1.0, -np.inf, np.inf, 5.0], numpy_dtype(dtype)) for _ in range(3)]
        arrays[place][3] = np.nan
        result = reduced(arrays, op).astype(np.float64)
        assert np.isnan(result[3])
        assert result[:3].tolist() == [1.0, -np.inf, np.inf]


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_rounded_once(dtype: str) -> None:
    half = numpy_dtype(dtype)
    one, little = np.ones(2, half), np.full(2, float(ml_dtypes.finfo(half).eps) / 2, half)
    # Each little one alone would be rounded away; two of them are not.
    assert (
        reduced([one, little, little], ReduceOp.SUM).astype(np.float64).tolist()
        == [1 + float(ml_dtypes.finfo(half).eps)] * 2
    )


def test_averages_of_float16_do_not_overflow() -> None:
    large = np.full(2, np.finfo(np.float16).max)
    assert reduced([large, large], ReduceOp.AVG).tolist() == large.tolist()
    assert np.isinf(reduced([large, large], ReduceOp.SUM)).all()


def test_overflow_and_invalid_warn_nobody() -> None:
    """pytest makes warnings errors."""
    top = np.full(2, np.finfo(np.float32).max, np.float32)
    assert np.isinf(reduced([top, top], ReduceOp.SUM)).all()
    assert np.isnan(reduced([np.array([np.inf]), np.array([-np.inf])], ReduceOp.SUM)).all()
    assert np.isnan(reduced([np.array([complex("inf")]), np.array([0j])], ReduceOp.PROD).real).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64", "int8"])
@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_the_result_may_lie_in_any_source(dtype: str, members: int) -> None:
    length = 200_001  # several chunks and a rest
    for place in range(members):
        arrays = [(np.arange(length) % 7 - rank).astype(dtype) for rank in range(members)]
        expected = reduced(arrays, ReduceOp.SUM)
        assert (expected.astype(np.complex128) == sum(array.astype(np.complex128) for array in arrays)).all()
        reduce_arrays(arrays, ReduceOp.SUM, arrays[place])
        assert arrays[place].tobytes() == expected.tobytes()


def test_floats_are_added_in_the_order_given() -> None:
    arrays = [np.array([value], np.float32) for value in (1e8, 1.0, -1e8)]
    assert reduced(arrays, ReduceOp.SUM).tolist() == [0.0]
    assert reduced([arrays[0], arrays[2], arrays[1]], ReduceOp.SUM).tolist() == [1.0]


@pytest.mark.parametrize("members", [1, 2, 3])
def test_nothing_reduces_to_nothing(members: int) -> None:
    assert reduced([np.empty(0, np.float16)] * members, ReduceOp.AVG).size == 0


def test_no_arrays_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        reduce_arrays([], ReduceOp.SUM, np.empty(1))
