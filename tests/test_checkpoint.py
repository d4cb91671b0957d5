"""Sparse checkpoints: what comes back, what is on disk, what is refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from d2sparse import masks, packing, scores
from d2sparse.checkpoint import load_sparse, save_sparse, sparse, store
from d2sparse.models import lenet5
from d2sparse.tree import flatten, prunable_leaves, replace


def pruned(params, share=0.1):
    """Parameters with the given share of every kernel live, and their masks."""
    kernels = prunable_leaves(params)
    counts = {path: int(share * leaf.size) for path, leaf in kernels.items()}
    kept = masks.select(scores.magnitude(kernels), counts)
    kept = replace(masks.dense_masks(params), kept)
    return masks.apply_masks(params, kept), kept


@pytest.fixture(scope="module")
def network():
    """A sparse LeNet beside the leaves of a batch normalisation."""
    model = lenet5(width=0.25)
    params, _ = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    norm = {"scale": jnp.ones(5), "bias": jnp.zeros(5), "steps": jnp.int32(7)}
    return pruned({**params, "norm": norm})


def bits(array):
    return np.asarray(array).tobytes()


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bits(a) == bits(b)


def shapes_of(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


@pytest.mark.parametrize("like", [lambda params: params, shapes_of])
def test_a_sparse_network_comes_back_to_the_bit(tmp_path, network, like):
    params, kept = network
    save_sparse(tmp_path / "run" / "ticket", params, kept)
    assert_same(load_sparse(tmp_path / "run" / "ticket", like(params)), network)


def test_the_size_is_that_of_live_values_and_bits(tmp_path, network):
    params, kept = network
    expected = 0
    for path, mask in flatten(kept).items():
        expected += int(mask.sum()) * flatten(params)[path].dtype.itemsize
        expected += 0 if mask.all() else -(-mask.size // 8)
    assert save_sparse(tmp_path / "ticket", params, kept) == expected
    on_disk = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert on_disk < expected + 16_000 < sum(x.nbytes for x in jax.tree.leaves(params))


def test_bfloat16_and_special_values_survive(tmp_path):
    word = np.array([0x7FC1, 0x8000, 0x7F80, 0x0000, 0x0001], np.uint16)
    params = {"w": jnp.asarray(word.view(jnp.bfloat16)), "b": jnp.ones(2, jnp.bfloat16)}
    kept = {"w": jnp.array([True, True, True, False, True]), "b": jnp.ones(2, bool)}
    assert save_sparse(tmp_path / "half", params, kept) == 4 * 2 + 1 + 2 * 2
    assert_same(load_sparse(tmp_path / "half", params), (params, kept))


def test_empty_arrays_survive(tmp_path):
    params = {"w": jnp.zeros((3, 2)), "s": jnp.zeros(()), "e": jnp.zeros((0, 4))}
    kept = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), params)
    save_sparse(tmp_path / "nothing", params, kept)
    assert_same(load_sparse(tmp_path / "nothing", params), (params, kept))
    with pytest.raises(ValueError, match="expected the leaves \\['e', 's'\\], got"):
        load_sparse(tmp_path / "nothing", {"e": params["e"], "s": params["s"]})


def test_paths_that_differ_in_separators_only(tmp_path):
    params = {"a.b": jnp.ones(1), "a": {"b": jnp.full(1, 2.0)}, "c": [jnp.full(1, 3.0)]}
    kept = masks.dense_masks(params)
    save_sparse(tmp_path / "names", params, kept)
    assert_same(load_sparse(tmp_path / "names", params), (params, kept))


def test_a_relative_path_and_a_single_array(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_sparse("ticket", jnp.eye(3), jnp.eye(3, dtype=bool))
    assert_same(load_sparse("ticket", jnp.eye(3)), (jnp.eye(3), jnp.eye(3, dtype=bool)))


def test_loaded_parameters_are_like_fresh_ones(tmp_path):
    # A step is compiled again for what is committed to a device, and takes the memory
    # of what is donated to it.
    step = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
    params, kept = pruned({"kernel": jnp.linspace(1.0, 2.0, 64).reshape(8, 8)})
    save_sparse(tmp_path / "ticket", params, kept)
    for leaf in jax.tree.leaves(load_sparse(tmp_path / "ticket", params)):
        assert not leaf.committed
    loaded, _ = load_sparse(tmp_path / "ticket", params)
    expected = 2 * np.asarray(params["kernel"])
    np.testing.assert_array_equal(step(loaded)["kernel"], expected)


def test_an_existing_directory_is_not_overwritten(tmp_path, network):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"does not exist yet, got .*mine; cho"):
        save_sparse(tmp_path / "mine", *network)
    assert not list((tmp_path / "mine").iterdir())


def test_nothing_is_written_of_what_cannot_be_compressed(tmp_path):
    params, kept = {"w": jnp.ones((2, 2))}, {"w": jnp.eye(2, dtype=bool)}
    with pytest.raises(ValueError, match="pruned weights to be 0 at 'w', got 2"):
        save_sparse(tmp_path / "ticket", params, kept)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    def broken(path, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.rename", broken)
    monkeypatch.setattr("os.rename", broken)
    params = {"w": jnp.ones(3)}
    with pytest.raises(Exception, match="disk full"):
        save_sparse(tmp_path / "ticket", params, masks.dense_masks(params))
    assert not (tmp_path / "ticket").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a checkpoint of one masked leaf, large enough for a file."""
    params, kept = pruned({"head": jax.random.normal(jax.random.key(1), (60, 80))}, 0.5)
    directory = tmp_path_factory.mktemp("saved") / "ticket"
    save_sparse(directory, params, kept)
    return directory, params


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            jnp.zeros((80, 60)),
            "expected float32\\[80, 60\\] at 'head', got float32\\[60",
        ),
        (
            jnp.zeros((60, 81)),
            "expected float32\\[60, 81\\] at 'head', got float32\\[60",
        ),
        (jnp.zeros((60, 80), jnp.float16), "expected float16\\[60, 80\\] at 'head', g"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_leaf(saved, leaf, message):
    with pytest.raises(ValueError, match=message):
        load_sparse(saved[0], {"head": leaf})


def test_a_mask_that_contradicts_the_values_names_the_leaf(saved, tmp_path):
    arrays, notes = store.read(saved[0])
    arrays["masks/head"] = ~arrays["masks/head"] | 1
    store.write(tmp_path / "wrong", arrays, notes)
    with pytest.raises(ValueError, match="values at 'head', as many as its mask"):
        load_sparse(tmp_path / "wrong", saved[1])


@pytest.mark.parametrize(
    "what", ["missing", "empty", "foreign", "file", "other", "another kind"]
)
def test_what_is_no_sparse_checkpoint_is_refused(tmp_path, what):
    path = tmp_path / what
    if what in ("empty", "foreign"):
        path.mkdir()
    if what in ("file", "foreign"):
        (path / "notes.txt" if path.is_dir() else path).write_text("mine")
    if what == "other":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"values": jnp.ones(3)})
    if what == "another kind":
        store.write(path, {"values": np.ones(3)}, {})
    with pytest.raises(
        ValueError, match="expected a directory written by `save_sparse`"
    ):
        load_sparse(path, {"values": jnp.ones(3)})


@pytest.mark.parametrize(
    "how", ["no manifest", "no data", "half of it", "a flipped bit"]
)
def test_a_damaged_directory_is_refused(saved, tmp_path, how):
    path = tmp_path / "copy"
    shutil.copytree(saved[0], path)
    data = max(path.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    whole = data.read_bytes()
    if how == "no manifest":
        (path / "manifest.json").unlink()
        message = "manifest.json: No such file or directory"
    elif how == "no data":
        data.unlink()
        message = f"{data.name}: No such file or directory"
    elif how == "half of it":
        data.write_bytes(whole[: len(whole) // 2])
        message = f"{data.name} has {len(whole) // 2} bytes and had {len(whole)}"
    else:
        data.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        message = f"{data.name} is not what was written"
    with pytest.raises(ValueError, match=rf"damaged or something .*{message}\); ch"):
        load_sparse(path, saved[1])


def test_what_is_stored_is_the_compressed_form(saved):
    directory, params = saved
    compressed = packing.compress(params, {"head": params["head"] != 0})
    for got, expected in zip(sparse._read(directory), compressed, strict=True):
        np.testing.assert_array_equal(got["head"], expected["head"])
