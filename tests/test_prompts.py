"""Prompts against NumPy: what they leave alone, what they train, where they lie."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import tree
from d2sparse.prompts import border, effective_size, frame, patch, random_patch

MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.5])
KEY = jax.random.key(0)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def normalised(x, mean=MEAN, std=STD):
    return (x - mean.astype(x.dtype)) / std.astype(x.dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(prompt, seed=1):
    theta = np.random.default_rng(seed).normal(size=prompt.live.shape)
    return theta.astype(np.float32)


def show(prompt, theta, *given):
    """One program: operations one by one are compiled one by one."""
    return jax.jit(prompt.apply)(theta, *given)


@pytest.mark.parametrize(
    ("canvas", "inner", "top", "left"),
    [
        (8, 4, 2, 2),
        (7, 4, 2, 2),  # The odd pixel is at the top and on the left.
        ((7, 8), (2, 3), 3, 3),
        (4, 4, 0, 0),
    ],
)
def test_a_border_against_numpy(canvas, inner, top, left):
    prompt = border(canvas, inner, 3, MEAN, STD)
    height, width = (inner, inner) if isinstance(inner, int) else inner
    x, theta = pixels(2, height, width, 3), drawn(prompt)
    expected = np.repeat(sigmoid(theta)[None], 2, axis=0)
    expected[:, top : top + height, left : left + width] = x
    seen = show(prompt, theta, x)
    assert seen.shape[1:] == prompt.shape
    np.testing.assert_allclose(seen, normalised(expected), rtol=1e-5, atol=1e-6)
    window = np.ones(prompt.shape[:2], bool)
    window[top : top + height, left : left + width] = False
    np.testing.assert_array_equal(prompt.live, np.repeat(window[..., None], 3, axis=2))
    assert effective_size(prompt) == 3 * (window.size - height * width)


def test_the_window_is_the_image_to_the_bit_whatever_theta_is():
    prompt = border(9, 4, 1)
    x = pixels(2, 4, 4, 1)
    for theta in (prompt.init(KEY), 30 * drawn(prompt)):
        seen = np.asarray(show(prompt, theta, x))
        np.testing.assert_array_equal(seen[:, 3:7, 3:7], x)


@pytest.mark.parametrize("squash", ["sigmoid", "clip", "none"])
def test_no_gradient_reaches_theta_in_the_window_and_all_of_it_around(squash):
    prompt = border(9, 4, 3, MEAN, STD, squash=squash)
    x, weight = pixels(2, 4, 4, 3), pixels(2, 9, 9, 3, seed=2)

    def loss(theta):
        return jnp.sum(weight * show(prompt, theta, x) ** 2)

    grads = np.asarray(jax.grad(loss)(0.1 * drawn(prompt)))
    assert (grads[~prompt.live] == 0).all()
    assert (grads[prompt.live] != 0).all()


def test_before_normalisation_a_border_lies_in_0_to_1():
    x = pixels(1, 4, 4, 1)
    for squash, bound in (("sigmoid", 16.0), ("clip", 1e6)):
        prompt = border(8, 4, 1, squash=squash)
        around = np.asarray(show(prompt, bound * np.sign(drawn(prompt)), x))
        around = around[0][prompt.live]
        inside = (around > 0) & (around < 1) if squash == "sigmoid" else around >= 0
        assert inside.all()
        assert (around <= 1).all()
        grey = np.asarray(show(prompt, prompt.init(KEY), x))[0][prompt.live]
        np.testing.assert_array_equal(grey, 0.5)
    plain = border(8, 4, 1, squash="none")
    theta = drawn(plain)
    around = np.asarray(show(plain, theta, x))[0][plain.live]
    np.testing.assert_array_equal(around, theta[plain.live])


def test_a_border_that_is_open_in_the_window_is_added_there():
    open_ = np.tril(np.ones((4, 4), bool))
    prompt = border(6, 4, 1, open=open_)
    x, theta = pixels(1, 4, 4, 1), drawn(prompt)
    seen = np.asarray(show(prompt, theta, x))[0, 1:5, 1:5, 0]
    added = sigmoid(theta[1:5, 1:5, 0])
    np.testing.assert_allclose(seen, x[0, ..., 0] + added * open_, rtol=1e-6)
    assert effective_size(prompt) == 36 - 16 + 10


def test_images_of_another_size_are_resized():
    x = pixels(2, 8, 8, 1)
    halved = show(border(6, 4, 1), np.zeros((6, 6, 1), np.float32), x)[:, 1:5, 1:5]
    expected = jax.image.resize(x, (2, 4, 4, 1), "bilinear", antialias=True)
    np.testing.assert_allclose(halved, expected, atol=1e-6)
    np.testing.assert_allclose(halved.mean(), x.mean(), atol=0.02)
    whole = show(frame(16, 8, 1), np.zeros((16, 16, 1), np.float32), x)
    assert whole.shape == (2, 16, 16, 1)
    as_it_is = border(10, None, 1)
    seen = show(as_it_is, as_it_is.init(KEY), x)
    np.testing.assert_array_equal(seen[:, 1:9, 1:9], x)


def test_a_grey_image_is_repeated_for_a_network_of_colours():
    grey, theta = pixels(2, 4, 4, 1), np.zeros((6, 6, 3), np.float32)
    prompt = border(6, 4, 3, MEAN, STD)
    seen = show(prompt, theta, grey)
    expected = show(prompt, theta, np.repeat(grey, 3, axis=3))
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("space", ["normalised", "pixel"])
def test_a_frame_is_added_to_the_outer_pixels(space):
    prompt = frame((6, 8), 2, 3, MEAN, STD, space=space)
    x, theta = pixels(2, 6, 8, 3), drawn(prompt)
    mask = np.ones((6, 8, 1), np.float32)
    mask[2:4, 2:6] = 0
    if space == "pixel":
        expected = normalised(x + theta * mask)
    else:
        expected = normalised(x) + theta * mask
    np.testing.assert_allclose(show(prompt, theta, x), expected, rtol=1e-5, atol=1e-6)
    assert effective_size(prompt) == 3 * (48 - 8)


@pytest.mark.parametrize(("side", "pad"), [(224, 30), (8, 1), (8, 4), (7, 3)])
def test_the_parameters_of_a_frame(side, pad):
    prompt = frame(side, pad, 3)
    strips = 2 * 3 * pad * (2 * side - 2 * pad)
    assert effective_size(prompt) == strips
    if side == 2 * pad:  # The whole image.
        assert prompt.live.all()


def test_a_patch_lies_at_the_top_left():
    prompt = patch(5, (2, 3), 1, 0.5, 0.25)
    x, theta = pixels(2, 5, 5, 1), drawn(prompt)
    expected = (x - 0.5) / 0.25
    expected[:, :2, :3] += theta
    np.testing.assert_allclose(show(prompt, theta, x), expected, rtol=1e-5, atol=1e-6)
    assert effective_size(prompt) == 6
    assert not prompt.is_random


def test_a_random_patch_goes_to_all_places_alike_and_to_the_centre_without_a_key():
    prompt = random_patch(4, 2, 1)
    apply = jax.vmap(lambda key: show(prompt, theta, x, key))
    x, theta = np.zeros((1, 4, 4, 1), np.float32), np.ones((2, 2, 1), np.float32)
    seen = np.asarray(jax.jit(apply)(jax.random.split(KEY, 900)))[:, 0, :, :, 0]
    assert (seen.sum((1, 2)) == 4).all()
    corners = seen.reshape(900, -1).argmax(1)
    places, counts = np.unique(corners, return_counts=True)
    assert sorted(places) == [
        row * 4 + column for row in range(3) for column in (0, 1, 2)
    ]
    assert (abs(counts - 100) < 45).all()
    centre = np.asarray(show(prompt, theta, x))[0, :, :, 0]
    np.testing.assert_array_equal(centre, np.pad(np.ones((2, 2)), 1))
    assert prompt.is_random


def test_one_place_serves_all_images_of_a_pass():
    prompt = random_patch(6, 2, 1)
    x = np.zeros((3, 6, 6, 1), np.float32)
    seen = np.asarray(show(prompt, np.ones((2, 2, 1), np.float32), x, KEY))
    assert (seen == seen[:1]).all()


PROMPTS = {
    "border": border(7, 4, 1, 0.5, 0.25),
    "clipped": border(7, 4, 1, 0.5, 0.25, squash="clip"),
    "frame": frame(4, 1, 1, 0.5, 0.25),
    "in pixels": frame(4, 1, 1, 0.5, 0.25, space="pixel"),
    "patch": patch(4, 2, 1, 0.5, 0.25),
    "random": random_patch(4, 2, 1, 0.5, 0.25),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_gradients_through_a_network_are_finite_differences(name):
    prompt = PROMPTS[name]
    rng, x = np.random.default_rng(3), pixels(2, 4, 4, 1)
    first = rng.normal(size=(np.prod(prompt.shape), 5)).astype(np.float32) / 4
    head = rng.normal(size=(5, 3)).astype(np.float32)
    direction = rng.normal(size=prompt.live.shape).astype(np.float32)

    @jax.jit
    def loss(theta):
        seen = show(prompt, theta, x, KEY).reshape(2, -1)
        return jnp.mean(jax.nn.logsumexp(jnp.tanh(seen @ first) @ head, axis=-1))

    theta = 0.1 * drawn(prompt)
    slope = np.sum(direction * np.asarray(jax.grad(loss)(theta)))
    eps = 1e-2
    ahead, back = loss(theta + eps * direction), loss(theta - eps * direction)
    np.testing.assert_allclose(slope, (ahead - back) / (2 * eps), rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("name", PROMPTS)
def test_half_precision_comes_back_as_it_is(name):
    prompt = PROMPTS[name]
    x, theta = pixels(2, 8, 8, 1).astype(jnp.float16), drawn(prompt)
    half = show(prompt, theta, x, KEY)
    assert half.dtype == jnp.float16
    whole = show(prompt, theta, x.astype(np.float32), KEY)
    np.testing.assert_array_equal(half, whole.astype(jnp.float16))
    assert prompt.init(KEY).dtype == jnp.float32


@pytest.mark.parametrize(
    "name",
    # One that stands still and one that moves.
    [
        pytest.param(
            name, marks=() if name in ("border", "random") else pytest.mark.slow
        )
        for name in PROMPTS
    ],
)
def test_seeds_are_mapped_and_begin_as_they_are_told(name):
    make = {
        "border": functools.partial(border, 7, 4),
        "frame": functools.partial(frame, 4, 1),
        "patch": functools.partial(patch, 4, 2),
        "random": functools.partial(random_patch, 4, 2),
    }.get(name)
    if make is None:
        return
    normal = make(1, start="normal")
    keys, x = jax.random.split(KEY, 3), pixels(2, 4, 4, 1)
    thetas = jax.vmap(normal.init)(keys)
    np.testing.assert_array_equal(
        thetas[1], jax.random.normal(keys[1], normal.live.shape)
    )
    seen = jax.vmap(normal.apply, (0, None, 0))(thetas, x, keys)
    expected = show(normal, thetas[2], x, keys[2])
    np.testing.assert_allclose(seen[2], expected, rtol=1e-6)
    assert not np.any(PROMPTS[name].init(KEY))


def test_a_prompt_is_no_kernel():
    """Weight decay and masks leave it alone."""
    theta = border(6, 4, 3).init(KEY)
    params = {"network": {"kernel": np.ones((2, 2))}, "prompt": theta}
    assert list(tree.prunable_leaves(params)) == ["network/kernel"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: border(4, 5, 1), "expected inner of at most 4 x 4"),
        (lambda: border(4, (2, 5), 1), "expected inner of at most 4 x 4"),
        (lambda: border(4, 2, 1, squash="tanh"), "expected squash of sigmoid, clip"),
        (lambda: border(4, 2, 1, start="ones"), "expected start of zeros, normal"),
        (lambda: border(4, 2, 1, std=0.0), "deviation above 0"),
        (
            lambda: border(4, 2, 3, mean=(0.5, 0.5)),
            "one for each of 3 channels as `mea",
        ),
        (lambda: border(4, None, 1, open=np.ones((2, 2), bool)), "shape of `inner`"),
        (lambda: border(4, 2, 1, open=np.ones((2, 2))), "expected bools of the shape"),
        (lambda: border((4, 4, 4), 2, 1), "a side or (height, width) as `size`"),
        (lambda: border(4, 2.5, 1), "whole number of at least 1 as `inner`"),
        (lambda: frame(7, 4, 1), "a frame of at most 3 pixels for images of 7 x 7"),
        (lambda: frame(8, 0, 1), "whole number of at least 1 as `pad`"),
        (lambda: frame(8, 2, 1, space="colour"), "space of normalised, pixel"),
        (lambda: patch(4, 5, 1), "expected side of at most 4 x 4"),
        (lambda: random_patch(4, (5, 1), 1), "expected side of at most 4 x 4"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 4, 4, 1), np.uint8), "got uint8 of shape (1, 4, 4, 1); divide"),
        (np.zeros((4, 4, 1), np.float32), "(batch, h, w, c)"),
        (np.full((1, 4, 4, 1), 255.0, np.float32), "values from 255 to 255"),
        (np.full((1, 4, 4, 1), np.nan, np.float32), "values from nan to nan"),
        (np.zeros((1, 4, 4, 2), np.float32), "images of 1 or 3 channels"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    prompt = border(6, 4, 3)
    with pytest.raises(ValueError, match=re.escape(message)):
        prompt.apply(prompt.init(KEY), images)


def test_an_image_that_is_larger_than_the_canvas_and_a_seed_for_a_key_are_refused():
    prompt = border(6, None, 1)
    with pytest.raises(ValueError, match="of at most 6 x 6, which the network sees"):
        prompt.apply(prompt.init(KEY), pixels(1, 7, 7, 1))
    moving = random_patch(4, 2, 1)
    with pytest.raises(ValueError, match="expected a random key"):
        moving.apply(moving.init(KEY), pixels(1, 4, 4, 1), 3)
