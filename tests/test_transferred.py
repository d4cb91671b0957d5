"""A trained network on another task: its start, what it sees, what is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from d2sparse import data, losses, models, prompts, train, tree
from d2sparse.constraints import (
    METHODS,
    STREAM_METHODS,
    TRANSFER_METHODS,
    Moves,
    TransferOptions,
    Transferred,
    fine_tuned,
    frozen,
    label_mapped,
    make_prompt,
    maps_of,
    probed,
    prompted,
    quantised,
    rigl,
    sees,
    started_from,
    with_head,
)
from d2sparse.models import Model, from_linen
from d2sparse.models.pretrained import Pretrained
from d2sparse.models.quantised import post_training
from d2sparse.quantisation import quantise_weights
from d2sparse.train import Recipe, constrain, fit, make_program, starting_as

ALIKE = ("prompted_random", "prompted_identity", "prompted_frequency")
K, SHAPE, STEPS = 3, (8, 8, 3), 4


class Small(nn.Module):
    """A convolution with its normalisation, and a dense last layer of 5 classes."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), strides=2, name="conv1")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm1")(x)
        x = nn.Conv(6, (3, 3), strides=2, name="conv2")(nn.relu(x))
        return nn.Dense(5, name="head")(nn.relu(x).mean(axis=(1, 2)))


MODEL = from_linen(Small())


@functools.cache
def source(seed=0, sparse=True):
    """A network with zeros, and with statistics unlike those of a new one."""
    params, state = MODEL.init(jax.random.key(seed), jnp.zeros((1, *SHAPE)))
    if sparse:
        kernel = params["conv2"]["kernel"]
        params["conv2"]["kernel"] = jnp.where(jnp.abs(kernel) > 0.1, kernel, 0.0)
    state = jax.tree.map(lambda x: x + 0.1, state)
    mean, std = jnp.array([0.4, 0.5, 0.6]), jnp.array([0.2, 0.25, 0.3])
    return Pretrained(MODEL, params, state, mean, std, SHAPE)


@functools.cache
def target():
    """Grey images, smaller than those of the source."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 6, 6, 1), np.uint8)
    return train.to_device(data.Split(images, np.arange(12, dtype=np.int32) % K))


def plain(**recipe):
    recipe = {"steps": STEPS, "batch_size": 6, "learning_rate": 0.1, **recipe}
    return train.plain(MODEL, target(), Recipe(optimizer="adamw", **recipe))


PROMPT = prompts.border(8, 4, 3, source().mean, source().std)
PROMPTED = (
    started_from(source()),
    prompted(PROMPT),
    frozen(["prompt"]),
    label_mapped(K, "identity"),
)
PROBED = (started_from(source()), sees(source()), probed(K))
TUNED = (started_from(source()), sees(source()), fine_tuned(K))


@functools.cache
def trained(which):
    """Program, first and last progress of a training."""
    ways = {"prompted": PROMPTED, "probed": PROBED, "tuned": TUNED}
    program = make_program(constrain(plain(), *ways[which]))
    first = program.init(jax.random.key(1), target())
    copied = jax.tree.map(jnp.copy, first)
    return program, copied, fit(program, first, target())


def shown():
    """What the source sees of the target, by numpy but for the resizing."""
    pixels = np.repeat(np.asarray(target().images, np.float32) / 255, 3, axis=3)
    resized = np.asarray(jax.image.resize(pixels, (12, *SHAPE), "bilinear"))
    return (resized - np.asarray(source().mean)) / np.asarray(source().std)


def test_images_are_as_the_source_saw_its_own():
    training = constrain(plain(), started_from(source()), sees(source()))
    seen = training.inputs(target(), None)
    np.testing.assert_allclose(seen, shown(), atol=1e-5)
    assert training.network.dense_macs == 4 * 4 * 27 * 4 + 2 * 2 * 36 * 6 + 6 * 5


def test_a_run_starts_at_the_weights_and_statistics_of_the_source():
    training = constrain(plain(), started_from(source()))
    state = make_program(training).init(jax.random.key(3), target()).state
    ours = (state.params, state.model_state)
    theirs = (source().params, source().model_state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))


def test_a_leaf_that_is_not_that_of_the_model_is_named():
    params = {"conv_1" if k == "conv1" else k: v for k, v in source().params.items()}
    with pytest.raises(ValueError, match=r"'params/conv1/bias'.*'params/conv_1/bias'"):
        started_from(source()._replace(params=params))
    wrong = {**source().params, "head": {"kernel": jnp.ones((6, 7)), "bias": 0.0}}
    with pytest.raises(ValueError, match="head/"):
        started_from(source()._replace(params=jax.tree.map(jnp.asarray, wrong)))


@pytest.mark.parametrize("which", ["prompted", "probed"])
def test_what_is_frozen_stays_to_the_bit(which):
    _, first, last = trained(which)
    before, after = first.state.model_state, last.state.model_state
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))
    (name,) = {path.partition("/")[0] for path in tree.flatten(last.state.params)}
    assert name == {"prompted": "prompt", "probed": "head"}[which]
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), first.state.params, last.state.params
    )
    assert jax.tree.all(moved)


def test_a_network_behind_a_prompt_is_in_evaluation_mode_in_training():
    program, first, _ = trained("prompted")
    own, state = program.training, first.state
    pixels = jnp.asarray(target().images, jnp.float32) / 255

    @jax.jit
    def both(params, model_state):
        x = own.inputs(target(), None)
        found, _ = own.model.apply(params, model_state, x, train=True)
        seen = PROMPT.apply(params["prompt"], pixels)
        leaves = (source().params, source().model_state)
        return found, MODEL.apply(*leaves, seen, train=False)[0][:, :K]

    found, expected = both(state.params, state.model_state)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_zeros_of_a_frozen_network_are_pruned_and_cost_nothing():
    zeros = int((source().params["conv2"]["kernel"] == 0).sum())
    assert zeros > 20
    dense = 4 * 4 * 27 * 4 + 2 * 2 * 36 * 6
    live = dense - 2 * 2 * zeros
    program, first, _ = trained("prompted")
    masks = program.training.masks(first.state)
    flat = tree.flatten(masks.used[0])
    assert int((~flat["network/conv2/kernel"]).sum()) == zeros
    assert program.training.cost(program.training, first.state, 12) == 2 * (live + 30)
    program, first, _ = trained("probed")
    # Forward, and the gradient with respect to the weights of the last layer.
    assert program.training.cost(program.training, first.state, 12) == live + 2 * 18


def test_a_probe_is_a_linear_classifier_of_the_features():
    # All examples in every step, so that their order does not matter.
    program = make_program(constrain(plain(batch_size=12), *PROBED))
    begun = program.init(jax.random.key(1), target())
    first = jax.tree.map(jnp.copy, begun)
    last = fit(program, begun, target())

    def features(x):
        leaves = {"params": source().params, **source().model_state}
        _, kept = Small().apply(
            leaves,
            x,
            train=False,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        conv = kept["intermediates"]["conv2"]["__call__"][0]
        return nn.relu(conv).mean(axis=(1, 2))

    x, labels = features(jnp.asarray(shown(), jnp.float32)), target().labels
    head = first.state.params["head"]
    bound = 6**-0.5
    assert head["kernel"].shape == (6, K)
    assert head["bias"].shape == (K,)
    assert 0 < float(jnp.abs(head["kernel"]).max()) <= bound
    (found,) = program.predict(first.state, target()).values()
    expected = jax.nn.softmax(x @ head["kernel"] + head["bias"][None])
    np.testing.assert_allclose(found, expected, atol=1e-5)

    rate = optax.cosine_decay_schedule(0.1, STEPS)
    decay = optax.add_decayed_weights(5e-4, {"kernel": True, "bias": False})
    tx = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))

    @jax.jit
    def step(head, state):
        def loss(head):
            logits = x @ head["kernel"] + head["bias"][None]
            return losses.cross_entropy(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(head), state, head)
        return optax.apply_updates(head, updates), state

    state = tx.init(head)
    for _ in range(STEPS):
        head, state = step(head, state)
    for name, leaf in last.state.params["head"].items():
        np.testing.assert_allclose(leaf, head[name], atol=1e-4)


def test_fine_tuning_moves_all_but_the_zeros():
    _, first, last = trained("tuned")
    kernel = source().params["conv2"]["kernel"]
    after = last.state.params["conv2"]["kernel"]
    assert ((after == 0) == (kernel == 0)).all()
    assert (after != kernel)[kernel != 0].any()
    assert last.state.params["head"]["kernel"].shape == (6, K)
    before, now = first.state.model_state, last.state.model_state
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, now)
    assert jax.tree.all(moved)


def test_trained_scales_are_under_the_masks_of_fine_tuning():
    scaled = quantised(4, scale="lsq"), quantised(4, 4, inputs="learned")
    for coarse in scaled:
        program = make_program(constrain(plain(), *TUNED, coarse))
        begun = jax.eval_shape(program.init, jax.random.key(0), target())
        scales = [p for p in tree.flatten(begun.state.params) if p.endswith("_scale")]
        assert len(scales) == 3


def test_a_label_map_finds_the_classes_of_the_source():
    """A source that knows the digits, behind a thin prompt; target labels are mixed."""
    digits = data.load("digits").train
    pixels = digits.images / 255 - 0.5
    means = np.stack([pixels[digits.labels == k].mean(0).ravel() for k in range(10)])
    model = models.from_linen(models.mlp.MLP((), 10))
    # The nearest mean is a linear classifier.
    head = {"kernel": 2 * means.T, "bias": -np.sum(means**2, axis=1)}
    head = jax.tree.map(np.float32, head)
    nearest = Pretrained(model, {"head": head}, {}, 0.5, 1.0, (8, 8, 1))
    mixed = np.random.default_rng(0).permutation(10)
    few = data.select(digits, np.arange(200))
    split = train.to_device(few._replace(labels=mixed[few.labels].astype(np.int32)))
    shown = prompted(prompts.frame((8, 8), 1, channels=1, mean=0.5, std=1.0))
    mapped = label_mapped(10, "iterative", 2)
    whole = started_from(nearest), shown, frozen(["prompt"]), mapped
    recipe = Recipe(steps=4, batch_size=50, optimizer="adamw")
    program = make_program(constrain(train.plain(model, split, recipe), *whole))
    end = fit(program, program.init(jax.random.key(0), split), split)
    (found,) = maps_of(end.state.model_state)
    np.testing.assert_array_equal(found[mixed], np.arange(10))


def test_zeros_may_grow_again_under_masks_of_another():
    tuned = (started_from(source()), sees(source()), fine_tuned(K, keeps_zeros=False))
    moves = rigl(0.5, Moves(interval=2, growth_samples=0))
    program = make_program(constrain(plain(), *tuned, moves))
    assert program.training.claims["the masks"] == "rigl"
    end = fit(program, program.init(jax.random.key(1), target()), target())
    before = np.asarray(source().params["conv2"]["kernel"])
    after = np.asarray(end.state.params["conv2"]["kernel"])
    assert ((before == 0) & (after != 0)).any()
    live = sum(
        int((leaf != 0).sum())
        for path, leaf in tree.flatten(end.state.params).items()
        if path.endswith("kernel")
    )
    assert live <= (27 * 4 + 36 * 6 + 6 * K) // 2
    with pytest.raises(ValueError, match="fine_tuned and rigl"):
        constrain(plain(), *TUNED, moves)


def test_a_new_last_layer_begins_within_its_range():
    """Uniform in ±1 / sqrt(6), and of other numbers in every run."""
    wide = 200
    training = constrain(plain(), started_from(source()), with_head(wide))
    like = jnp.zeros((1, *SHAPE))
    init = jax.jit(lambda key: training.model.init(key, like)[0])
    first, second = (init(jax.random.key(n)) for n in range(2))
    kernel = np.asarray(first["head"]["kernel"])
    assert (kernel.shape, first["head"]["bias"].shape) == ((6, wide), (wide,))
    assert np.abs(kernel).max() <= 6**-0.5
    # Of a uniform distribution: mean 0, variance a third of the squared bound.
    np.testing.assert_allclose(kernel.mean(), 0, atol=0.03)
    np.testing.assert_allclose(kernel.var(), 1 / 18, rtol=0.1)
    assert (kernel != second["head"]["kernel"]).all()
    conv = source().params["conv1"]["kernel"]
    np.testing.assert_array_equal(first["conv1"]["kernel"], conv)
    assert training.network.macs["head/kernel"] == 6 * wide
    assert training.network.params["head"]["kernel"].shape == (6, wide)


def test_images_of_colour_and_of_the_same_size_are_standardised_alone():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, *SHAPE), np.uint8)
    batch = train.to_device(data.Split(images, np.zeros(2, np.int32)))
    training = constrain(plain(), started_from(source()), sees(source()))
    mean, std = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.25, 0.3])
    expected = (images.astype(np.float32) / 255 - mean) / std
    np.testing.assert_allclose(training.inputs(batch, None), expected, atol=1e-5)
    two = train.to_device(data.Split(images[..., :2], np.zeros(2, np.int32)))
    with pytest.raises(ValueError, match="channels"):
        training.inputs(two, None)


@pytest.mark.parametrize(
    "which", [pytest.param("prompted", marks=pytest.mark.slow), "probed"]
)
def test_few_bits_of_the_moment_are_seen_by_what_is_trained(which):
    """Under `quantised` the frozen weights are those that rounding once makes."""
    bits = {"conv1/kernel": 8, "conv2/kernel": 3, "head/kernel": 8}
    if which == "prompted":
        behind = (prompted(PROMPT), frozen(["prompt"]))
    else:
        behind = (sees(source()), frozen(["head"]))

    start, images = plain(), target()  # Not made while something is compiled.

    def outputs(network, *coarse):
        training = constrain(start, started_from(network), *coarse, *behind)
        x = training.inputs(images, None)
        params, state = training.model.init(jax.random.key(0), x)
        return training.model.apply(params, state, x, train=False)[0]

    rounded = source()._replace(params=quantise_weights(source().params, bits))
    found = jax.jit(lambda: outputs(source(), quantised(3, 0)))()
    expected, exact = outputs(rounded), outputs(source())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - exact).max() > 1e-3


def test_what_goes_before_a_network_takes_its_place_is_refused():
    for before in (
        (quantised(4),),
        (prompted(PROMPT),),
        (label_mapped(K, "random"),),
        (with_head(K),),
        (frozen(["head"]),),
    ):
        with pytest.raises(ValueError, match=r"started_from before .*; put it first"):
            constrain(plain(), *before, started_from(source()))
    calibrated = quantised(4, 4, inputs="calibrated")
    with pytest.raises(ValueError, match="new last layer before quantised looks"):
        constrain(plain(), started_from(source()), calibrated, with_head(K))
    with pytest.raises(ValueError, match="quantised before what freezes"):
        constrain(plain(), *PROBED, quantised(4))


def test_what_cannot_be_frozen_is_said():
    started = constrain(plain(), started_from(source()))
    with pytest.raises(ValueError, match=r"got 'conv9'; it has .*conv1"):
        frozen(["conv9"])(started)
    with pytest.raises(ValueError, match="leave frozen away"):
        frozen(["conv1", "conv2", "norm1", "head"])(started)
    moves = rigl(0.5, Moves(interval=2))
    for order in ([moves, frozen(["head"])], [frozen(["head"]), moves]):
        with pytest.raises(ValueError, match="decides the masks"):
            constrain(started, *order)
    with pytest.raises(ValueError, match="name it by `head`"):
        probed(K, head="conv1")(started)
    with pytest.raises(ValueError, match="where runs start"):
        started_from(source())(started)
    listed = Model(lambda key, x: ([jnp.ones((2, 2))], {}), MODEL.apply)
    inside = frozen(["head"])(started._replace(model=listed)).model
    with pytest.raises(ValueError, match="nested dictionaries"):
        inside.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))


WAYS = [
    # Maps of all kinds are trained in test_prompted.
    # A fine-tuned network resumes as others do, and starts as a probed one.
    pytest.param(name, marks=pytest.mark.slow if name in (*ALIKE, "fine_tuned") else ())
    for name in TRANSFER_METHODS
]


@pytest.mark.parametrize("name", WAYS)
def test_every_way_resumes_to_the_bit_and_serves_other_sources(name, caplog):
    """Another source network does not compile anything of the training anew."""
    assert name not in {*METHODS, *STREAM_METHODS}
    options = TransferOptions(prompt_size=4, map_every=2)

    def training_of(network):
        given = Transferred(network, K, STEPS, options)
        return constrain(plain(), *TRANSFER_METHODS[name].constraints(given))

    program = make_program(training_of(source()))
    kept = []

    def save(progress, logs):
        kept.append(jax.tree.map(jnp.copy, progress))

    begun = program.init(jax.random.key(1), target())
    watch = train.Watch(save=save, save_every=2)
    end = fit(program, begun, target(), watch)
    middle = next(p for p in kept if int(p.state.step) == 2)
    resumed = fit(program, middle, target())
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), _plain(end.state), _plain(resumed.state)
    )
    assert jax.tree.all(same)
    other = starting_as(program, training_of(source(seed=5)))
    begun = other.init(jax.random.key(1), target())
    with jax.log_compiles(), caplog.at_level("WARNING"):
        further = fit(other, begun, target(), watch)
    assert "ompil" not in caplog.text
    leaves = zip(*map(_numbers, (end.state, further.state)), strict=True)
    assert any((a != b).any() for a, b in leaves)


def _numbers(state):
    return jax.tree.leaves((state.params, state.model_state))


def _plain(state):
    return state._replace(key=jax.random.key_data(state.key))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_networks_of_few_bits_can_be_put_on_another_task(bits):
    images = [jnp.asarray(shown(), jnp.float32)]
    parts = (MODEL, source().params, source().model_state)
    model, params, state = post_training(*parts, images, bits, activation_bits=bits)
    coarse = source()._replace(model=model, params=params, model_state=state)
    zeros = source().params["conv2"]["kernel"] == 0
    assert (params["conv2"]["kernel"] == 0)[zeros].all()
    shown_as = (started_from(coarse), sees(coarse))
    for way in (
        (started_from(coarse), prompted(PROMPT), frozen(["prompt"])),
        (*shown_as, probed(K)),
        (*shown_as, fine_tuned(K), quantised(bits, 0)),
    ):
        program = make_program(constrain(plain(steps=1), *way))
        end = fit(program, program.init(jax.random.key(0), target()), target())
        leaves = jax.tree.leaves(end.state.params)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits):
    given = Transferred(source(), K, STEPS, bits=bits)
    with pytest.raises(ValueError, match=f"bits.* got {bits}"):
        TRANSFER_METHODS["fine_tuned"].constraints(given)


def test_prompts_have_the_sizes_of_the_network():
    def live(**options):
        prompt = make_prompt(source(), TransferOptions(**options))
        assert prompt.shape == SHAPE
        return int(prompt.live.sum())

    assert live() == 3 * (64 - 16)
    assert live(prompt_size=6) == 3 * (64 - 36)
    assert live(prompt="frame") == 3 * (64 - 36)
    assert live(prompt="patch", prompt_size=2) == 12
    assert live(prompt="random_patch") == 3 * 16
    with pytest.raises(ValueError, match="expected inner of at most 8 x 8"):
        make_prompt(source(), TransferOptions(prompt_size=9))
    with pytest.raises(ValueError, match="prompt"):
        TransferOptions(prompt="banner")
