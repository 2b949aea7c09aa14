import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.data.stratified import _by_class


@pytest.mark.parametrize("most", [3, 300, 100_000])
@pytest.mark.parametrize("least", [0, -1])
@given(seed=st.integers(0, 1000), rows=st.integers(0, 200))
def test_rows_sort_by_site_and_class_whatever_their_numbers(most: int, least: int, seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    owners, labels = random.integers(0, most, rows), random.integers(least, 10, rows)
    # Few distinct draws, so that equals must stay as they came.
    drawn = random.integers(0, 5, rows).astype(np.uint64) << np.uint64(60)
    assert _by_class(drawn, labels, owners).tolist() == np.lexsort((drawn, labels, owners)).tolist()
    numbers = labels.astype(np.float64)
    assert _by_class(drawn, numbers, owners).tolist() == np.lexsort((drawn, numbers, owners)).tolist()
