"""The numbers of a table: means over seeds and their errors, and how it is laid out."""

import math
import statistics

import jax.numpy as jnp
import pytest

from d2sparse import records
from d2sparse.records import summarize


def test_summarize_agrees_with_the_standard_library():
    values = [0.5, 0.75, 0.8, 0.1]
    found = summarize(jnp.array(values))
    assert found.mean == pytest.approx(statistics.mean(values), rel=1e-6)
    error = statistics.stdev(values) / math.sqrt(4)
    assert found.standard_error == pytest.approx(error, rel=1e-6)
    assert found.n == 4


def test_one_value_has_no_standard_error_and_none_is_an_error():
    found = summarize(iter([0.5]))
    assert (found.mean, found.n) == (0.5, 1)
    assert math.isnan(found.standard_error)
    with pytest.raises(ValueError, match="at least one value, got none"):
        summarize([])


def test_a_diverged_repetition_shows_in_the_mean():
    assert math.isnan(summarize([0.5, math.nan]).mean)


def test_paired_difference_matches_seeds_not_positions():
    a = {3: 0.9, 1: 0.5, 2: 0.7}
    b = {1: 0.4, 2: 0.5, 3: 0.6, 9: 0.0}
    found = records.paired_difference(a, b)
    differences = [0.9 - 0.6, 0.5 - 0.4, 0.7 - 0.5]
    assert found == pytest.approx(summarize(differences))
    assert found.mean > 0
    with pytest.raises(ValueError, match=r"no seed is in both, got seeds \[1, 2, 3\]"):
        records.paired_difference(a, {4: 0.0})


def test_a_markdown_table_is_aligned_and_leaves_absent_cells_empty():
    rows = [
        {"method": "D2-Sparse", "accuracy": "91.2 ± 0.3", "unused": 1},
        {"method": "dense", "macs": 1.0},
    ]
    columns = {"method": "method", "accuracy": "accuracy (%)", "macs": "MACs"}
    table = records.markdown_table(rows, columns).splitlines()
    assert len({len(line) for line in table}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[0] == ["method", "accuracy (%)", "MACs"]
    assert [cell.strip("-") for cell in cells[1]] == [":", ":", ":"]
    assert [cell.endswith(":") for cell in cells[1]] == [False, True, True]
    assert cells[2:] == [["D2-Sparse", "91.2 ± 0.3", ""], ["dense", "", "1.0"]]


def test_numbers_in_cells_are_left_as_they_are():
    table = records.markdown_table([{"a": "x", "b": "0.50"}], {"a": "a", "b": "b"})
    assert "0.50" in table
