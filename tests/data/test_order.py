import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flare.data.order import RowOrder, micro_batches, permutation
from flare.plan.balance import allocate_rows

GOLDEN_42_0_10 = [0, 4, 7, 8, 5, 3, 1, 2, 6, 9]


def test_every_row_once_an_epoch_and_epochs_differ() -> None:
    first, second = permutation(42, 0, 1000), permutation(42, 1, 1000)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert (first != second).mean() > 0.9
    assert (first != permutation(43, 0, 1000)).mean() > 0.9


def test_order_is_fixed_for_all_time() -> None:
    """A changed hash would silently reorder every resumed run."""
    assert permutation(42, 0, 10).tolist() == GOLDEN_42_0_10


def test_order_looks_random() -> None:
    order = permutation(7, 3, 4096)
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06  # 3 sigma of random orders is 0.047


@given(st.integers(1, 40), st.integers(1, 17), st.integers(1, 12))
def test_rows_by_position_do_not_depend_on_where_reading_begins(num_rows: int, batch: int, steps: int) -> None:
    whole = RowOrder(1, num_rows).rows(0, batch * steps)
    resumed = [RowOrder(1, num_rows).rows(s * batch, (s + 1) * batch) for s in range(steps)]
    assert np.array_equal(whole, np.concatenate(resumed))


@given(st.integers(1, 8), st.integers(0, 50))
def test_equal_shares_differ_by_one_at_most(ranks: int, extra: int) -> None:
    counts = allocate_rows(ranks + extra, [1.0] * ranks)
    assert sum(counts) == ranks + extra
    assert max(counts) - min(counts) <= 1


def test_shares_follow_weights() -> None:
    assert allocate_rows(8, [3.0, 1.0]) == [6, 2]
    assert allocate_rows(3, [100.0, 1.0]) == [2, 1]
    with pytest.raises(ValueError, match="cannot be shared"):
        allocate_rows(1, [1.0, 1.0])


def test_micro_batches_cover_the_rows() -> None:
    assert [m.tolist() for m in micro_batches(np.arange(5), 2)] == [[0, 1], [2, 3], [4]]
