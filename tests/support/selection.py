"""What of a sweep runs with every commit, and what with the slow tests."""

import pytest


def first(quick, rows):
    """Parameters for `pytest.mark.parametrize`: every row, those outside `quick` marked as slow.

    Compiling takes nearly all of the tests' time, a program a row, and most rows of a sweep take
    the same path through the code. So the quick suite has those that differ most, of each
    implementation, and tools/run_slow_tests.sh the rest. A row of several arguments is a tuple.
    """
    rows = list(rows)
    strange = set(quick) - set(rows)
    assert not strange, f"not in the sweep: {strange}"
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)),
            marks=() if row in quick else pytest.mark.slow,
        )
        for row in rows
    ]
