"""Any rows, mixed with other constraints, through the runs of the experiments."""

import dataclasses

import pytest
from runs import read, without_time

from experiments import compare

TINY = compare.Config(
    methods=("rigl", "imp", "soup"),
    with_=("averaged",),
    steps=8,
    refresh_interval=2,
    growth_samples=16,
    rounds=1,
    members=2,
    width=0.05,
    seeds=1,
    report_every=4,
    checkpoint_every=2,
    progress=False,
)


def test_methods_under_one_more_constraint_are_compared_and_not_repeated(tmp_path):
    config = dataclasses.replace(TINY, workdir=str(tmp_path))
    first = compare.run(config)
    assert [row["method"] for row in first["methods"]] == list(config.methods)
    assert all(row["seeds"] == 1 for row in first["methods"])
    rigl, imp, soup = first["methods"]
    assert rigl["nonzeros"] == imp["nonzeros"] == soup["nonzeros"]
    assert imp["relative_macs"] > rigl["relative_macs"]
    again = compare.run(config)
    assert repr(without_time(again)) == repr(without_time(first))  # NaN is NaN.
    (unit,) = [path for path in (tmp_path / "units").iterdir() if "soup" in path.name]
    before = without_time(read(unit))
    unit.unlink()  # From its last checkpoint it comes to the same.
    compare.run(config)
    assert without_time(read(unit)) == before


def test_what_cannot_be_compared_is_refused_by_a_sentence(tmp_path):
    for methods, why in {
        ("self_distilled",): "hands over to a student",
        (): "expected methods of",
    }.items():
        config = dataclasses.replace(TINY, methods=methods, workdir=str(tmp_path))
        with pytest.raises(ValueError, match=why):
            compare.run(config)
