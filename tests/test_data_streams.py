"""Streams of megabatches: index arithmetic against plain loops."""

import numpy as np
import pytest

from d2sparse import data
from d2sparse.data import (
    accumulate,
    cut_stream,
    epoch_batches,
    on_finest_grid,
    visible,
)

LABELS = np.repeat(np.arange(5), 23)[np.random.default_rng(0).permutation(115)]


def everything(stream):
    return np.concatenate([part for own in stream for part in own])


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("megabatches", [1, 2, 7, 23])
def test_every_example_is_in_one_place(megabatches, permuted, stratified):
    stream = cut_stream(LABELS, megabatches, 3, 0.2, stratified, permuted)
    np.testing.assert_array_equal(np.sort(everything(stream)), np.arange(len(LABELS)))
    sizes = [len(own.train) + len(own.validation) for own in stream]
    assert len(sizes) == megabatches
    assert max(sizes) - min(sizes) <= 1
    for own, size in zip(stream, sizes, strict=True):
        assert len(own.validation) == int(0.2 * size)


def test_without_a_permutation_the_order_is_that_of_the_data():
    stream = cut_stream(LABELS, 4, seed=0, validation_fraction=0.1, permuted=False)
    pieces = np.array_split(np.arange(len(LABELS)), 4)
    for own, piece in zip(stream, pieces, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate(own)), piece)
        for part in own:
            np.testing.assert_array_equal(part, np.sort(part))


ORDERS = {"drawn": LABELS, "by class": np.sort(LABELS), "in turn": np.arange(115) % 5}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.75])
def test_a_stratified_stream_holds_out_a_share_of_every_class(
    order, permuted, fraction
):
    labels = ORDERS[order]
    for own in cut_stream(labels, 4, 3, fraction, stratified=True, permuted=permuted):
        train, held_out = (np.bincount(labels[part], minlength=5) for part in own)
        size = len(own.train) + len(own.validation)
        assert held_out.sum() == int(fraction * size)
        share = (train + held_out) * held_out.sum() / size
        assert (abs(held_out - share) < 1).all()
        assert (train > 0).all()
    for own in cut_stream(labels, 4, 3, 0.0, stratified=True, permuted=False):
        first = labels[own.train[:20]].reshape(4, 5)
        np.testing.assert_array_equal(first, np.tile(np.arange(5), (4, 1)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("stratified", [False, True])
def test_every_class_is_trained_on(order, permuted, stratified):
    labels = ORDERS[order]
    for seed in range(20):
        stream = cut_stream(labels, 1, seed, 0.2, stratified, permuted)
        assert set(labels[stream[0].train]) == set(range(5))
        held_out = len(set(labels[stream[0].validation]))
        assert held_out == 5 if stratified else held_out >= 3


def test_what_is_held_out_of_an_ordered_stream_is_drawn():
    labels = np.sort(LABELS)
    counts = np.zeros(len(labels))
    for seed in range(400):
        counts[cut_stream(labels, 3, seed, 0.25, permuted=False)[1].validation] += 1
    piece, expected = np.array_split(np.arange(115), 3)[1], 400 * 9 / 38
    assert abs(counts[piece] - expected).max() < 4.5 * np.sqrt(expected)


def test_the_only_example_of_a_class_is_trained_on():
    labels = np.array([0] * 10 + [1, 2])
    held_out = set()
    for seed in range(30):
        (own,) = cut_stream(labels, 1, seed, 0.5)
        assert {1, 2} <= set(labels[own.train])
        assert 4 <= len(own.validation) <= 6
        held_out |= set(own.validation)
    assert held_out == set(range(10))


def test_a_stratified_stream_has_every_class_in_every_megabatch():
    for own in cut_stream(LABELS, 5, 0, 0.0, stratified=True):
        counts = np.bincount(LABELS[own.train], minlength=5)
        assert set(counts) <= {23 // 5, 23 // 5 + 1}


def test_seeds_name_streams():
    one, again, other = (cut_stream(LABELS, 4, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(everything(one), everything(again))
    assert (everything(one) != everything(other)).any()


def test_a_few_shot_stream_is_a_budget_that_is_cut():
    chosen = data.budget(LABELS, 6, seed=0)
    stream = cut_stream(LABELS[chosen], 3, 0, 0.0, stratified=True)
    for own in stream:
        counts = np.bincount(LABELS[chosen][own.train], minlength=5)
        np.testing.assert_array_equal(counts, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megabatches": 116}, "from 1 to 115 megabatches, as there are exam.*got 116"),
        ({"megabatches": 0}, "from 1 to 115 megabatches"),
        ({"validation_fraction": 1.0}, r"validation_fraction in \[0, 1\), got 1\.0"),
        (
            {"megabatches": 24, "stratified": True},
            "each of 24 megabatches, got 23 examples of class 0; lower the number",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(changes, message):
    arguments = {"labels": LABELS, "megabatches": 4, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        cut_stream(**arguments)


STREAM = cut_stream(LABELS, 6, seed=0, validation_fraction=0.25)


def arrived(stages):
    return np.concatenate([np.zeros(0, int), *(own.train for own in STREAM[:stages])])


def test_replay_of_nothing_of_the_last_and_of_all():
    for replay, first in (("none", lambda t: t), ("last", lambda t: max(t - 1, 0))):
        for t, own in enumerate(visible(STREAM, replay, seed=0)):
            for field in ("train", "validation"):
                parts = [getattr(past, field) for past in STREAM[first(t) : t + 1]]
                np.testing.assert_array_equal(
                    getattr(own, field), np.concatenate(parts)
                )
    for t, own in enumerate(visible(STREAM, "full", seed=0)):
        np.testing.assert_array_equal(own.train, arrived(t + 1))


def test_without_replay_earlier_examples_are_never_touched():
    for t, own in enumerate(visible(STREAM, "none", seed=0)):
        assert not set(own.train) & set(arrived(t))


def test_a_reservoir_holds_as_many_as_it_has_room_for_and_none_twice():
    before = set()
    for t, own in enumerate(visible(STREAM, "buffer", seed=0, size=20)):
        new = STREAM[t].train
        kept = own.train[: -len(new)]
        np.testing.assert_array_equal(own.train[-len(new) :], new)
        assert len(kept) == len(set(kept)) == min(20, len(arrived(t)))
        assert set(kept) <= set(arrived(t))
        if t > 1:  # What has been dropped does not come back.
            assert set(kept) <= before | set(STREAM[t - 1].train)
        before = set(kept)


def test_a_reservoir_is_uniform_over_what_came():
    counts = np.zeros(len(LABELS))
    for seed in range(600):
        last = visible(STREAM, "buffer", seed, size=15)[-1].train[:15]
        counts[last] += 1
    past = arrived(5)
    expected, deviation = 600 * 15 / len(past), np.sqrt(600 * 15 / len(past))
    assert abs(counts[past] - expected).max() < 4.5 * deviation


def test_validation_is_replayed_in_proportion():
    own = visible(STREAM, "buffer", seed=0, size=30)[-1]
    share = sum(len(m.validation) for m in STREAM) / sum(len(m.train) for m in STREAM)
    assert len(own.validation) == len(STREAM[-1].validation) + round(30 * share)
    held_out = {i for m in STREAM for i in m.validation}
    assert set(own.validation) <= held_out


def test_fractions_forget_geometrically():
    ends = {0.0: "none", 1.0: "full"}
    for fraction, replay in ends.items():
        for own, other in zip(
            visible(STREAM, "fraction", 0, fraction=fraction),
            visible(STREAM, replay, 0),
            strict=True,
        ):
            np.testing.assert_array_equal(np.sort(own.train), np.sort(other.train))
    size = 0
    for t, own in enumerate(visible(STREAM, "fraction", 0, fraction=0.5)):
        size = round(0.5 * size) + len(STREAM[t].train)
        assert len(own.train) == len(set(own.train)) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": "all"}, "expected a replay of none, last, .*got 'all'"),
        ({"replay": "buffer", "size": 0}, "at least 1 example, got 0; for none choose"),
        (
            {"replay": "fraction", "fraction": 1.5},
            r"replay fraction in \[0, 1\], got 1",
        ),
    ],
)
def test_replays_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        visible(STREAM, seed=0, **options)


def test_a_learner_that_waits_for_all_has_all():
    (whole,) = accumulate(STREAM, len(STREAM))
    np.testing.assert_array_equal(whole.train, arrived(len(STREAM)))
    assert [len(own.train) for own in accumulate(STREAM, 4)] == [len(arrived(4))]
    with pytest.raises(ValueError, match=r"wait for 1 to 6 megabatches.*got 7"):
        accumulate(STREAM, 7)


def test_waiting_is_measured_on_the_finest_grid():
    assert on_finest_grid([0.3, 0.2], 3, 7, 0.9) == [0.9, 0.9, 0.3, 0.3, 0.3, 0.2, 0.2]
    assert on_finest_grid([0.3, 0.2], 1, 2, 0.9) == [0.3, 0.2]


@pytest.mark.parametrize("start", [0, 3, 4, 9])
def test_batches_do_not_depend_on_where_one_starts(start):
    examples = np.arange(100, 118)
    whole = epoch_batches(examples, 0, 16, 4, seed=(1, 2))
    part = epoch_batches(examples, start, 16 - start, 4, seed=(1, 2))
    np.testing.assert_array_equal(part, whole[start:])
    for epoch in whole.reshape(4, 4 * 4):
        assert len(set(epoch)) == 16
        assert set(epoch) <= set(examples)
    assert (whole[:4] != whole[4:8]).any()


def test_a_megabatch_that_fills_no_batch_is_refused():
    with pytest.raises(ValueError, match="fill a batch of 8, got 7 examples to train"):
        epoch_batches(np.arange(7), 0, 1, 8, seed=(0,))
