"""What tests of trainings share: a tiny network, its data, and comparisons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import train
from d2sparse.constraints import pair_masks
from d2sparse.data import Split
from d2sparse.dual import Dual
from d2sparse.models import Model
from d2sparse.tree import flatten

SIZE, BATCH, CLASSES, WIDTH = 24, 8, 5, 6
SHAPES = {"first/kernel": (16, WIDTH), "head/kernel": (WIDTH, CLASSES)}
KERNELS = tuple(SHAPES)
SETTINGS = {"learning_rate": 0.1, "weight_decay": 0.0}  # What every step looks up.


@functools.cache
def perceptron():
    """One hidden layer, normalised by the batch and not by the running mean."""

    def init(key, x):
        first, head = jax.random.split(key)
        kernel = jax.random.normal(head, (WIDTH, CLASSES))
        params = {"first": {"kernel": jax.random.normal(first, (x[0].size, WIDTH))}}
        params["head"] = {"kernel": kernel, "bias": jnp.zeros(CLASSES)}
        return params, {"mean": jnp.zeros(WIDTH)}

    def apply(params, model_state, x, *, train):
        hidden = x.reshape(len(x), -1) @ params["first"]["kernel"]
        mean = hidden.mean(axis=0) if train else model_state["mean"]
        hidden = jax.nn.relu(hidden - mean.reshape(1, -1)) / 4
        if train:
            model_state = {"mean": 0.9 * model_state["mean"] + 0.1 * mean}
        head = params["head"]
        return hidden @ head["kernel"] + head["bias"].reshape(1, -1), model_state

    return Model(init, apply)


@functools.cache
def centred():
    """One kernel, whose outputs have mean 0 over the batch or the running mean."""

    def init(key, x):
        kernel = jax.random.normal(key, (x[0].size, CLASSES))
        return {"kernel": kernel}, {"mean": jnp.zeros(CLASSES)}

    def apply(params, model_state, x, *, train):
        logits = x.reshape(len(x), -1) @ params["kernel"] / 4
        mean = logits.mean(axis=0) if train else model_state["mean"]
        if train:
            model_state = {"mean": 0.9 * model_state["mean"] + 0.1 * mean}
        return logits - mean.reshape(1, -1), model_state

    return Model(init, apply)


@functools.cache
def images():
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(SIZE, 4, 4, 1)).astype(np.uint8)
    labels = rng.integers(CLASSES, size=SIZE).astype(np.int32)
    return train.to_device(Split(pixels, labels))


def start(**recipe):
    """The plain training of the tiny network."""
    recipe = train.Recipe(**{"batch_size": BATCH, **recipe})
    return train.plain(perceptron(), images(), recipe)


def step_of(model, like, tx, growth_samples=0, when=None, **recipe):
    """A step with an optimiser, or one made of settings; states need SETTINGS."""
    training = train.plain(model, like, train.Recipe(**recipe))._replace(
        transform=lambda rate, settings, key: tx(settings) if callable(tx) else tx,
        growth_samples=growth_samples,
        when=when,
    )
    return train.make_step(training)


def begin(program, seed=0, **settings):
    return program.init(jax.random.key(seed), images(), settings)


def fit(program, state, steps):
    """The state after further steps; the one that is given is kept."""
    rows = train.step_indices(state, images(), steps, BATCH)
    return program.run(copy(state), images(), rows)[0]


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def arrays(tree):
    """Every number of a tree by path, on the host; random keys as their numbers."""

    def leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return {path: leaf(x) for path, x in flatten(tree).items()}


def assert_close(tree, expected, atol=0.0):
    tree, expected = arrays(tree), arrays(expected)
    assert tree.keys() == expected.keys()
    for path in tree:
        np.testing.assert_allclose(
            tree[path], expected[path], rtol=0, atol=atol, err_msg=path
        )


def largest(scores, k):
    """The k largest scores, ties to the lower index."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


def live(masks):
    """Numbers of live weights by kernel."""
    return {path: int(masks[path].sum()) for path in KERNELS}


def nested(flat):
    """Parameters or masks of the network, from those by path."""
    head = {"kernel": flat["head/kernel"], "bias": flat["head/bias"]}
    tree = {"first": {"kernel": flat["first/kernel"]}, "head": head}
    return jax.tree.map(jnp.asarray, tree)


def masks_of(state):
    """The masks of both learners of a pair, by path."""
    return Dual(*map(arrays, pair_masks(state)))


def half_cosine(step, steps):
    return (1 + np.cos(np.pi * min(step / steps, 1))) / 2
