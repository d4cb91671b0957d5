"""The weak-scaling table: all numbers of devices, for runs and for batches."""

import pytest

from experiments.scaling import weak
from experiments.scaling.weak import Config


@pytest.mark.slow
def test_every_number_of_devices_is_measured():
    rows = weak.run(Config(steps=2, repeats=1, batch_size=4)).rows
    assert [(row["what grows"], row["devices"]) for row in rows] == [
        (what, width) for what in ("runs", "batch") for width in (1, 2, 4, 8)
    ]
    assert all(float(row["ms per step"]) > 0 for row in rows)
    assert rows[0]["efficiency"] == rows[4]["efficiency"] == "1.00"


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1 as `steps`, got 0"):
        weak.run(Config(steps=0))
