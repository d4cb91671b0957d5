"""Learning on a stream: to the bit as by the loop it replaces, from any interruption."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import runs

from d2sparse import data, models
from d2sparse.constraints import (
    STREAM_METHODS,
    Options,
    Streamed,
    StreamOptions,
    live_weights,
)
from d2sparse.train import (
    Recipe,
    Watch,
    constrain,
    fit_phases,
    make_program,
    plain,
)
from d2sparse.transforms import get_masks
from experiments import anytime
from experiments.megabatches import walks
from experiments.splits import draw_splits

OLD = anytime.Config(
    samples_per_class=12,
    megabatches=3,
    epochs=2,
    batch_size=8,
    tau=3.0,
    seeds=2,
    width=0.1,
    refresh_interval=2,
    report_every=4,
    score_batch=5,
    progress=False,
)
STREAM = StreamOptions(megabatches=3, epochs=2, tau=3.0, score_batch=5)
OPTIONS = Options(refresh_interval=2, horizon=6)
STAGES = 3


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@functools.cache
def labelled(seed=0):
    return draw_splits(OLD, data.load("digits"), seed).train


def start(**changes):
    augment = data.make_augment(padding=1, flip=False, cutout=0, jitter=0.0)
    recipe = Recipe(batch_size=8, learning_rate=0.05, augment=augment, **changes)
    return plain(models.make_model("lenet_300_100", 10, 0.1), labelled(), recipe)


@functools.cache
def program(name, **changes):
    method, options = STREAM_METHODS[name], dataclasses.replace(STREAM, **changes)
    within = dataclasses.replace(OPTIONS, **method.sets)
    given = Streamed(within, options, np.asarray(labelled().labels))
    return make_program(constrain(start(), *method.constraints(given)))


def begin(own, seed, **settings):
    settings = {"seed": seed, **settings}
    return own.init(jax.random.key(seed), labelled(seed), settings)


def learn(own, seed=0, **settings):
    """The states after the stages, and the progress at the end."""
    after = []

    def ended(progress, title):
        assert title == f"megabatch {len(after) + 1}"
        after.append(jax.tree.map(np.asarray, bits(progress.state)))

    watch = Watch(ended=ended)
    end = fit_phases(own, begin(own, seed, **settings), labelled(seed), watch)
    return after, end


def bits(state):
    """All that a stage leaves, keys as numbers."""
    return state._replace(key=jax.random.key_data(state.key))


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)


def masks_of(state):
    return get_masks(state.opt_state)


# The loop that it replaces


def walked(names, tmp_path, monkeypatch, **changes):
    """What every stage began and ended with, by the loop of `experiments.anytime`."""
    found, depart = {}, walks.Walk.depart

    def watched(walk, stage, best, state):
        after = depart(walk, stage, best, state)
        kept = found.setdefault((walk.job.unit.method, walk.job.unit.seed), [])
        kept.append((jax.tree.map(np.asarray, bits(after)), walk.session.ledger.spent))
        return after

    monkeypatch.setattr(walks.Walk, "depart", watched)
    config = dataclasses.replace(
        OLD, methods=tuple(names), workdir=str(tmp_path / "old"), **changes
    )
    anytime.run(config)
    return found


SINGLES = ("dense", "scratch", "one_shot", "app", "app_magnitude", "gradual", "rigl")


def test_stages_have_the_bits_of_the_loop_that_it_replaces(tmp_path, monkeypatch):
    names = (*SINGLES, "app_2022", "random_matched")
    for (name, seed), stages in walked(names, tmp_path, monkeypatch).items():
        settings = {}
        if name == "random_matched":
            settings = {f"density_{n}": d for n, d in enumerate(matched[seed])}
        after, _ = learn(program(name), seed, **settings)
        assert len(after) == len(stages) == STAGES
        if name == "app_2022":
            matched = locals().get("matched", {})
            size = program(name).training.network.weights
            matched[seed] = [live(state) / size for state in after]
        for new, (old, _) in zip(after, stages, strict=True):
            assert same(new.params, old.params), (name, seed)
            assert same(masks_of(new), masks_of(old)), (name, seed)
            assert same(new.opt_state, old.opt_state), (name, seed)
            assert same((new.step, new.key), (old.step, old.key)), (name, seed)


def live(state):
    network = program("dense").training.network
    return sum(live_weights(network, (masks_of(state),)).values())
