"""A network under a prompt and a label map: what is trained, pruned and chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BATCH, KERNELS, arrays, assert_close, perceptron

from d2sparse import label_maps, prompts, train
from d2sparse.checkpoint.leaves import layout
from d2sparse.constraints import (
    Moves,
    StreamOptions,
    averaged,
    coupled,
    distilled,
    iterative_magnitude,
    label_mapped,
    prompted,
    remapped,
    rigl,
    static,
    stream,
    stream_steps,
)
from d2sparse.constraints.label_mapped import Mapped, maps_of
from d2sparse.constraints.prompted import Shown
from d2sparse.dual import Coupling, Dual
from d2sparse.train import Watch, constrain, fit, lasting, make_program
from d2sparse.transforms import get_masks

K, STEPS = 3, 12
PROMPT = prompts.border(6, 4, 1, 0.4, 0.25)


@functools.cache
def target():
    data = tiny.images()
    return data._replace(labels=data.labels % K)


def plain(**recipe):
    recipe = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 0.5, **recipe}
    return train.plain(perceptron(), target(), train.Recipe(weight_decay=0.1, **recipe))


def frozen(training):
    """Only the prompt moves, and statistics are those of the source."""
    model = training.model

    def transform(rate, settings, key):
        inner = training.transform(rate, settings, key)
        fixed = {"network": True, "prompt": False}
        return optax.chain(inner, optax.masked(optax.set_to_zero(), fixed))

    def apply(params, model_state, x, *, train):
        del train
        return model.apply(params, model_state, x, train=False)

    return training._replace(transform=transform, model=model._replace(apply=apply))


def begun(program, seed=0):
    return program.init(jax.random.key(seed), target())


def trained(program, watch=None, seed=0):
    return fit(program, begun(program, seed), target(), watch)


def pixels():
    return np.asarray(target().images, np.float32) / 255


@jax.jit
def source_logits(params, statistics):
    """What the source says of the images under their prompt, in evaluation."""
    seen = PROMPT.apply(params["prompt"], pixels())
    return perceptron().apply(params["network"], statistics, seen, train=False)[0]


def voted(params, statistics, rows=slice(None)):
    logits = np.asarray(source_logits(params, statistics))[rows]
    counts = np.zeros((tiny.CLASSES, K), np.int32)
    labels = np.asarray(target().labels)[rows]
    np.add.at(counts, (logits.argmax(1), labels), 1)
    return np.asarray(label_maps.greedy(counts)).tolist()


def chosen(state, rows=slice(None)):
    """The map that the votes of a state choose, and the one that it has."""
    (found,) = maps_of(state.model_state)
    return voted(state.params, state.model_state.own, rows), found.tolist()


@functools.cache
def under_prompt():
    return make_program(constrain(plain(), prompted(PROMPT)))


def test_the_network_is_that_of_the_canvas_and_its_leaves_alone_are_prunable():
    training = under_prompt().training
    network = training.network
    assert network.weights == 36 * 6 + 6 * 5
    assert network.dense_macs == 36 * 6 + 6 * 5
    assert network.macs["prompt"] == 0
    assert not network.prunable("prompt", network.params["prompt"])
    state = begun(under_prompt()).state
    shapes = jax.tree.map(lambda x: x.shape, state.params)
    assert shapes == jax.tree.map(lambda x: x.shape, network.params)
    alone = perceptron().init(jax.random.key(3), np.zeros((1, 6, 6, 1), np.float32))
    under = training.model.init(jax.random.key(3), np.zeros((1, 4, 4, 1), np.float32))
    assert_close(under[0]["network"], alone[0])


def test_predictions_are_those_of_the_prompted_images():
    program = under_prompt()
    state = begun(program).state
    logits = source_logits(state.params, state.model_state)
    found = program.predict(state, target())["network"]
    np.testing.assert_allclose(found, jax.nn.softmax(logits), rtol=1e-5, atol=1e-6)


def test_a_prompt_alone_learns_and_the_network_stays_as_it_is():
    program = make_program(
        constrain(
            plain(steps=60), prompted(PROMPT), label_mapped(K, "identity"), frozen
        )
    )
    before = arrays(begun(program).state.params)
    losses = []
    watch = Watch(every=10, report=lambda _, logs: losses.append(logs["loss"]))
    state = trained(program, watch).state
    after = arrays(state.params)
    for path in before:
        if path != "prompt":
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert losses[-1] < losses[0]
    moved = after["prompt"] != 0
    np.testing.assert_array_equal(moved, PROMPT.live)  # No weight decay elsewhere.


def test_a_growing_network_under_a_prompt():
    moves = Moves(interval=4, growth_samples=0)
    training = constrain(plain(), prompted(PROMPT), rigl(0.5, moves))
    program = make_program(training)
    state = trained(program).state
    masks = arrays(get_masks(state.opt_state))
    params = arrays(state.params)
    assert masks["prompt"].all()
    live = sum(int(masks[f"network/{path}"].sum()) for path in KERNELS)
    assert live == training.network.weights // 2
    for path in masks:
        assert (params[path][~masks[path]] == 0).all()
    # Pixels that a live weight looks at have moved, all others are as they were.
    seen = masks["network/first/kernel"].any(axis=1).reshape(6, 6, 1)
    assert (params["prompt"] != 0)[PROMPT.live & seen].all()
    used = training.masks(state).used
    spent = float(train.forward_macs(training.network, used))
    assert spent == pytest.approx(live, rel=1e-6)  # A weight is used once an image.
    first = arrays(get_masks(begun(program).state.opt_state))
    assert any((first[path] != masks[path]).any() for path in masks)


def test_a_patch_moves_in_training_and_not_in_evaluation():
    moving = prompts.random_patch(4, 2, 1, 0.4, 0.25, start="normal")
    training = constrain(plain(), prompted(moving))
    keys = jax.random.split(jax.random.key(0), 2)
    first, second = (training.inputs(target(), key) for key in keys)
    assert isinstance(first, Shown)
    np.testing.assert_allclose(first.images, pixels(), rtol=1e-6)
    assert not np.array_equal(*(jax.random.key_data(x.key) for x in (first, second)))
    assert not isinstance(training.inputs(target(), None), Shown)
    program = make_program(training)
    state = begun(program).state
    one, two = (program.predict(state, target())["network"] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    pair = constrain(training, coupled((static(0.5),), (static(0.5),)))
    rows = jnp.arange(BATCH)
    for own in (training, pair):  # A step has a key to give.
        state = jax.eval_shape(make_program(own).init, jax.random.key(0), target())
        after, _ = jax.eval_shape(train.make_step(own), state.state, target(), rows)
        assert layout(after) == layout(state.state)


@functools.cache
def iterative():
    return make_program(
        constrain(plain(), prompted(PROMPT), label_mapped(K, "iterative", every=5))
    )


def test_an_iterative_map_is_chosen_at_every_interval_and_for_what_counts():
    program, seen = iterative(), []
    assert [phase.stop for phase in program.training.phases] == [5, 10, 12]

    def note(progress):
        seen.append((int(progress.state.step), *chosen(progress.state)))

    stale = []
    watch = Watch(
        begun=note, every=1, report=lambda p, _: stale.append(chosen(p.state))
    )
    end = trained(program, watch)
    assert [step for step, *_ in seen] == [0, 5, 10]
    for _, expected, found in seen:
        assert found == expected
    # Held fixed in between.
    assert [found for _, found in stale[:5]] == [seen[0][2]] * 5
    assert any(expected != found for expected, found in stale)
    counts = program.training.finish(end, target(), program)
    expected, found = chosen(counts)
    assert found == expected
    for leaf, other in ((counts.params, end.state.params),):
        assert_close(leaf, other)
    outputs = program.predict(counts, target())["network"]
    logits = source_logits(counts.params, counts.model_state.own)[:, np.array(found)]
    np.testing.assert_allclose(outputs, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)


def test_a_run_resumes_to_the_bit_and_without_a_final_choice_the_map_stays():
    program, saved = iterative(), []
    stop = Watch(
        every=4,
        save_every=7,
        save=lambda p, logs: saved.append((jax.tree.map(jnp.copy, p), dict(logs))),
    )
    end = trained(program, stop)
    progress, logs = saved[0]
    assert int(progress.state.step) == 7
    again = fit(program, progress, target(), Watch(logs=logs))
    assert_close(again, end)
    lazy = constrain(
        plain(),
        prompted(PROMPT),
        label_mapped(K, "iterative", every=5, final_refresh=False),
    )
    assert lazy.finish(end, target(), make_program(lazy)) is end.state


@pytest.mark.slow
def test_several_runs_in_one_program_have_the_maps_that_they_have_alone():
    program = iterative()
    alone = [trained(program, seed=n) for n in range(2)]
    runs = [begun(program, n) for n in range(2)]
    together = train.fit_together(program, runs, [target()] * 2, [Watch()] * 2)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(
            maps_of(one.state.model_state)[0], maps_of(other.state.model_state)[0]
        )
        assert_close(one.state.params, other.state.params, atol=1e-5)


def test_a_frequency_map_is_that_of_the_first_prompt():
    program = make_program(
        constrain(plain(), prompted(PROMPT), label_mapped(K, "frequency"))
    )
    first = begun(program).state
    expected, identity = chosen(first)
    assert identity == [0, 1, 2]
    end = trained(program)
    assert maps_of(end.state.model_state)[0].tolist() == expected
    assert program.training.finish(end, target(), program) is end.state


def test_random_maps_are_those_of_seeds():
    training = constrain(plain(), prompted(PROMPT), label_mapped(K, "random"))
    program = make_program(training)
    maps = {
        tuple(maps_of(begun(program, n).state.model_state)[0].tolist())
        for n in range(5)
    }
    assert len(maps) > 1
    assert all(len(set(own)) == K for own in maps)


def test_soft_votes_and_the_hungarian_map_average_and_prune():
    """Each learner of a pair has a map of its own, and so has an average."""
    training = constrain(
        plain(),
        prompted(PROMPT),
        label_mapped(K, "identity"),
        coupled((static(0.5),), (static(0.5), averaged(0.5)), Coupling()),
        remapped(K, every=6, soft=True, solver="hungarian"),
    )
    program = make_program(training)
    end = trained(program)
    counts = training.finish(end, target(), program)
    fast, slow = maps_of(counts.model_state)
    for params, state, found in zip(
        counts.params, counts.model_state, (fast, slow), strict=True
    ):
        logits = source_logits(params, state.own)
        soft = label_maps.votes(logits, target().labels, K, soft=True)
        best = label_maps.hungarian(soft)
        reached = [float(soft[m, np.arange(K)].sum()) for m in (best, found)]
        assert reached[0] == pytest.approx(reached[1], rel=1e-5)
    assert isinstance(counts.params, Dual)
    assert program.predict(counts, target())["ensemble"].shape == (tiny.SIZE, K)


def test_on_a_stream_only_what_has_arrived_votes():
    options = StreamOptions(megabatches=2, epochs=1, stream_validation=0.25)
    labels = np.asarray(target().labels)
    steps = stream_steps(options, labels, BATCH)
    training = constrain(
        plain(),
        lasting(steps),
        prompted(PROMPT),
        label_mapped(K, "identity"),
        stream(options, labels),
        remapped(K, every=100),
    )
    program, seen = make_program(training), []

    def note(progress):
        voters = np.asarray(progress.memory["voters"])
        seen.append((voters, *chosen(progress.state, voters)))

    trained(program, Watch(begun=note))
    sizes = [int(voters.sum()) for voters, *_ in seen]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] < tiny.SIZE
    for number in (0, 2):
        _, expected, found = seen[number]
        assert found == expected


def rounds():
    return constrain(
        plain(),
        prompted(PROMPT),
        label_mapped(K, "identity"),
        iterative_magnitude(0.5, rounds=1),
        remapped(K, every=6),
    )


def test_phases_of_rounds_are_cut_and_their_titles_stay():
    stops = [(phase.stop, phase.title) for phase in rounds().phases]
    assert stops == [(1, ""), (6, ""), (12, "round 0"), (6, ""), (12, "round 1")]


@pytest.mark.slow
def test_rounds_of_pruning_under_a_map():
    titles, training = [], rounds()
    program = make_program(training)
    watch = Watch(ended=lambda p, title: titles.append((title, *chosen(p.state)[1:])))
    end = trained(program, watch)
    assert [title for title, _ in titles] == ["round 0", "round 1"]
    live = sum(
        int(m.sum())
        for p, m in arrays(get_masks(end.state.opt_state)).items()
        if "kernel" in p
    )
    assert live == training.network.weights // 2


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            (static(0.5), prompted(PROMPT)),
            "prompt before what decides the masks, got it",
        ),
        (
            (prompted(PROMPT), prompted(PROMPT)),
            "one constraint that decides the prompt",
        ),
        ((remapped(K),), "outputs are mapped, got none"),
        ((label_mapped(K, "frequency"), remapped(K)), "decides the choice of labels"),
        ((label_mapped(K, "random"), label_mapped(K, "random")), "decides the labels"),
        ((distilled(), label_mapped(K, "frequency")), "hands over to another"),
    ],
)
def test_what_does_not_go_together_is_refused(constraints, message):
    with pytest.raises(ValueError, match=message):
        constrain(plain(), *constraints)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ((label_mapped(6, "random"),), "at most 5 target classes"),
        (
            (label_mapped(K, "frequency"), iterative_magnitude(0.5)),
            "label_mapped after what decides the phases",
        ),
    ],
)
def test_what_is_found_when_a_run_begins(constraints, message):
    program = make_program(constrain(plain(), *constraints))
    with pytest.raises(ValueError, match=message):
        begun(program)


def test_a_map_of_two_networks_at_once_is_refused():
    pair = coupled((static(0.5),), (static(0.5),))
    model = constrain(plain(), pair, label_mapped(K, "random")).model
    with pytest.raises(ValueError, match="label_mapped before what pairs networks"):
        jax.eval_shape(model.init, jax.random.key(0), pixels())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "iterative"}, "`every`, of an iterative map"),
        ({"kind": "random", "every": 3}, "`every`, of an iterative map"),
        ({"kind": "best"}, "expected kind of random, identity"),
        ({"kind": "frequency", "solver": "best"}, "expected solver of greedy"),
        ({"kind": "iterative", "every": 0}, "whole number of at least 1 as `every`"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        label_mapped(K, **options)


def test_floats_that_are_no_pixels_are_refused_when_the_training_begins():
    odd = target()._replace(images=jnp.full((tiny.SIZE, 4, 4, 1), 3.0))
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got values from 3 to 3"):
        under_prompt().init(jax.random.key(0), odd)


def test_a_mapped_state_is_a_tree():
    state = Mapped({"mean": jnp.zeros(2)}, jnp.arange(2))
    assert len(jax.tree.leaves(state)) == 2
