"""Data sources: the embedded digits, real TFDS folders, and small ones made here."""

import io
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from PIL import Image
from prepared import PREPARED, prepared_version, shortened
from sklearn.datasets import load_digits

from d2sparse.data import load, sources

ROOT = Path(__file__).resolve().parents[1]
# Name: (train, test, image shape, classes).
NAMED = {
    "mnist": (60000, 10000, (28, 28, 1), 10),
    "fashion_mnist": (60000, 10000, (28, 28, 1), 10),
    "cifar10": (50000, 10000, (32, 32, 3), 10),
    "cifar100": (50000, 10000, (32, 32, 3), 100),
    "svhn_cropped": (73257, 26032, (32, 32, 3), 10),
}
MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def random_images(seed, count, shape=(5, 4, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def example(image, label):
    """A serialized tf.train.Example, without TensorFlow."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    feature = {
        "image": tf_feature_pb2.Feature(
            bytes_list=tf_feature_pb2.BytesList(value=[png(image)])
        ),
        "label": tf_feature_pb2.Feature(
            int64_list=tf_feature_pb2.Int64List(value=[label])
        ),
    }
    features = tf_feature_pb2.Features(feature=feature)
    return tf_example_pb2.Example(features=features).SerializeToString()


def prepare(
    root, splits, *, version="1.0.0", file_format="array_record", features=None
):
    """A TFDS folder `toy` with the given examples, in the layout that TFDS writes."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = features or {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    folder = root / "toy" / version
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(str(folder))
    info = {"name": "toy", "version": version, "fileFormat": file_format, "splits": []}
    for split, examples in splits.items():
        path = folder / f"toy-{split}.{file_format}-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for image, label in examples:
            writer.write(example(image, label))
        writer.close()
        info["splits"].append(
            {
                "name": split,
                "shardLengths": [str(len(examples))],
                "numBytes": str(path.stat().st_size),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return root


def labelled(seed, count, shape=(5, 4, 3)):
    images = random_images(seed, count, shape)
    return [(image, i % 3) for i, image in enumerate(images)]


def test_digits_are_those_of_scikit_learn_scaled_to_255():
    digits = load("digits")
    sheets = {
        tuple(x.ravel()): y for x, y in zip(*load_digits(return_X_y=True), strict=True)
    }
    assert digits.name == "digits"
    for split in digits.train, digits.test:
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.shape == (len(split.labels), 8, 8, 1)
        for image, label in zip(split.images, split.labels, strict=True):
            levels = tuple(np.round(image.ravel() / 255 * 16))
            assert sheets[levels] == label


def test_digits_split_is_the_documented_one():
    images, labels = load_digits(return_X_y=True)
    test = []
    for label in range(10):
        members = [i for i in range(len(labels)) if labels[i] == label]
        test += [members[i * len(members) // 50] for i in range(50)]
    digits = load("digits")
    assert np.bincount(digits.test.labels).tolist() == [50] * 10
    assert len(digits.train.labels) == 1297
    chosen = np.round(images[sorted(test)].reshape(-1, 8, 8, 1) * 255 / 16)
    np.testing.assert_array_equal(digits.test.images, chosen)
    np.testing.assert_array_equal(digits.test.labels, labels[sorted(test)])


def test_digits_need_no_tfds_and_the_package_needs_neither():
    program = (
        "import sys, d2sparse.data as data;"
        "assert not {'sklearn', 'tensorflow_datasets', 'PIL'} & set(sys.modules);"
        "data.load('digits');"
        "assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", NAMED)
def test_named_data_sets_agree_with_the_decoder_of_tfds(name, tmp_path):
    import tensorflow_datasets as tfds

    _, _, shape, num_classes = NAMED[name]
    source = load(name, shortened(name, tmp_path, train=300, test=200))
    assert source.num_classes == num_classes
    assert source.train.images.shape == (300, *shape)
    assert source.test.images.shape == (200, *shape)
    for split in ("train", "test"):
        images, labels, _ = getattr(source, split)
        reference = tfds.data_source(name, split=split, data_dir=PREPARED)
        for i in range(0, len(labels), 10):
            np.testing.assert_array_equal(images[i], reference[i]["image"])
            assert labels[i] == reference[i]["label"]
    assert "tensorflow" not in sys.modules


def test_mnist_test_split_has_its_known_class_counts(tmp_path):
    source = load("mnist", shortened("mnist", tmp_path, train=10))
    assert np.bincount(source.test.labels).tolist() == MNIST_TEST_COUNTS


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_whole_named_data_sets(name):
    prepared_version(name)
    train, test, shape, num_classes = NAMED[name]
    source = load(name, PREPARED)
    assert source.train.images.shape == (train, *shape)
    assert source.test.images.shape == (test, *shape)
    for split in source.train, source.test:
        assert set(split.labels.tolist()) == set(range(num_classes))


def test_a_small_data_set_round_trips(tmp_path):
    splits = {"train": labelled(0, 7), "test": labelled(1, 4)}
    source = load("toy", prepare(tmp_path, splits))
    assert source.num_classes == 3
    for split, examples in zip(
        (source.train, source.test), splits.values(), strict=True
    ):
        np.testing.assert_array_equal(split.images, [image for image, _ in examples])
        np.testing.assert_array_equal(split.labels, [label for _, label in examples])


def test_reading_in_chunks_keeps_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr("d2sparse.data.sources._CHUNK", 3)
    examples = labelled(0, 8)
    root = prepare(tmp_path, {"train": examples, "test": examples})
    images = load("toy", root).train.images
    np.testing.assert_array_equal(images, [image for image, _ in examples])


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    splits = {"train": labelled(0, 5), "validation": labelled(1, 3)}
    source = load("toy", prepare(tmp_path, splits))
    np.testing.assert_array_equal(source.test.images, random_images(1, 3))


def test_the_latest_version_is_taken_unless_one_is_named(tmp_path):
    for seed, version in enumerate(("1.9.0", "1.10.0")):
        splits = {"train": labelled(seed, 3), "test": labelled(9, 3)}
        prepare(tmp_path, splits, version=version)
    (tmp_path / "toy" / "2.0.0.incomplete").mkdir()
    (tmp_path / "toy" / "2.0.0.incomplete" / "features.json").write_text("{}")
    latest, named = load("toy", tmp_path), load("toy:1.9.0", str(tmp_path))
    np.testing.assert_array_equal(latest.train.images, random_images(1, 3))
    np.testing.assert_array_equal(named.train.images, random_images(0, 3))


def test_a_configuration_must_be_named_where_there_are_several(tmp_path):
    splits = {"train": labelled(0, 3), "test": labelled(1, 3)}
    prepare(tmp_path / "prepared", splits)
    for config in ("small", "large"):
        (tmp_path / "toy" / config).mkdir(parents=True)
        (tmp_path / "toy" / config / "1.0.0").symlink_to(
            tmp_path / "prepared" / "toy" / "1.0.0"
        )
    with pytest.raises(ValueError, match=r"expected one of \['toy/large', 'toy/small'"):
        load("toy", tmp_path)
    assert len(load("toy/small", tmp_path).train.labels) == 3


def test_the_default_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    splits = {"train": labelled(0, 3), "test": labelled(1, 3)}
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepare(tmp_path, splits)))
    assert len(load("toy").train.labels) == 3
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    default = tmp_path / "home" / "tensorflow_datasets"
    with pytest.raises(
        ValueError, match=f"data_dir {re.escape(str(default))} does not exist"
    ):
        load("mnist")


@pytest.mark.parametrize(
    ("name", "close"), [("mnits", "'mnist'"), ("Digit", "'digits'"), ("", r"\[\]")]
)
def test_an_unknown_name_lists_close_matches(name, close, tmp_path):
    with pytest.raises(ValueError, match=f"unknown data set {name!r}; .*{close}"):
        load(name, tmp_path)


def test_a_missing_folder_or_data_set_says_how_to_prepare_it(tmp_path):
    install = "pip install tensorflow tensorflow-datasets"
    absent = tmp_path / "absent"
    with pytest.raises(
        ValueError, match=f"data_dir {re.escape(str(absent))} does not exist"
    ) as error:
        load("mnist", absent)
    assert install in str(error.value)
    command = (
        "python -c 'import tensorflow_datasets as tfds; "
        f'tfds.builder("mnist", data_dir="{absent}", file_format="array_record")'
        ".download_and_prepare()'"
    )
    assert command in str(error.value)
    prepare(tmp_path, {"train": labelled(0, 1), "test": labelled(0, 1)})
    with pytest.raises(
        ValueError, match="lacks a prepared 'mnist', it has toy;"
    ) as error:
        load("mnist", tmp_path)
    assert install in str(error.value)


def test_another_file_format_is_refused(tmp_path):
    splits = {"train": labelled(0, 3), "test": labelled(1, 3)}
    prepare(tmp_path, splits, file_format="tfrecord")
    with pytest.raises(ValueError, match=r"array_record files, got \['tfrecord'\]"):
        load("toy", tmp_path)


def test_images_of_varying_size_are_refused(tmp_path):
    splits = {"train": labelled(0, 3) + labelled(1, 1, (6, 4, 3)), "test": []}
    with pytest.raises(ValueError, match=r"\(5, 4, 3\) and \(6, 4, 3\) in toy/train"):
        load("toy", prepare(tmp_path, splits))


def test_unlabelled_examples_are_refused(tmp_path):
    splits = {"train": labelled(0, 3), "test": [(random_images(0, 1)[0], -1)]}
    with pytest.raises(ValueError, match="label, got -1 in toy/test"):
        load("toy", prepare(tmp_path, splits))


@pytest.mark.parametrize("splits", [["train"], ["test"], ["train", "extra"]])
def test_missing_splits_are_refused(splits, tmp_path):
    prepare(tmp_path, {split: labelled(0, 3) for split in splits})
    with pytest.raises(ValueError, match="expected splits 'train' and 'test'"):
        load("toy", tmp_path)


def test_other_tasks_are_refused(tmp_path):
    from tensorflow_datasets import features

    splits = {"train": labelled(0, 3), "test": labelled(1, 3)}
    image, label = features.Image(shape=(5, 4, 3)), features.ClassLabel(num_classes=3)
    cases = {
        "text": ({"text": features.Text(), "label": label}, "image classification"),
        "box": ({"image": image, "bbox": features.BBoxFeature()}, "classification"),
        "deep": (
            {"image": features.Image(shape=(5, 4, 1), dtype=np.uint16), "label": label},
            "expected uint8 images .* uint16",
        ),
    }
    for folder, (feature, message) in cases.items():
        prepare(tmp_path / folder, splits, features=feature)
        with pytest.raises(ValueError, match=message):
            load("toy", tmp_path / folder)


class Counted:
    """Records that remember which of them were read."""

    def __init__(self, examples):
        self.examples, self.read = examples, []

    def __len__(self):
        return len(self.examples)

    def __getitems__(self, numbers):
        self.read += numbers
        examples = [self.examples[number] for number in numbers]
        return [{"image": png(image), "label": label} for image, label in examples]


@pytest.fixture
def in_processes(monkeypatch):
    """Calls a function in so many threads, which take themselves for processes."""
    index = threading.local()

    def call(count, function):
        barrier, given = threading.Barrier(count, timeout=20), [None] * count

        def gather(own):
            given[index.value] = own
            barrier.wait()
            everything = np.stack(given)
            barrier.wait()
            return everything

        def thread(number):
            index.value = number
            return function(number)

        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: index.value)
        monkeypatch.setattr(multihost_utils, "process_allgather", gather)
        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(thread, number) for number in range(count)]
            return [future.exception() or future.result() for future in futures]

    return call


@pytest.mark.parametrize("chunk", [3, 4096])
@pytest.mark.parametrize("processes", [1, 2, 3, 7, 13])
def test_each_process_reads_its_share_and_all_get_everything(
    in_processes, monkeypatch, processes, chunk
):
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    examples = labelled(0, 11)
    records = [Counted(examples) for _ in range(processes)]
    splits = in_processes(
        processes, lambda number: sources._read("toy/train", records[number], "RGB")
    )
    for split in splits:
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.images, random_images(0, 11))
        assert split.labels.tolist() == [label for _, label in examples]
    assert [n for own in records for n in own.read] == list(range(11))
    assert {len(own.read) for own in records} <= {11 // processes, -(-11 // processes)}


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ((random_images(1, 1, (6, 4, 3))[0], 0), r"one size, got \([56], 4, 3\) and"),
        ((random_images(1, 1)[0], -1), "label, got -1 in toy"),
    ],
)
@pytest.mark.parametrize("position", [0, 4, 9])
def test_all_processes_refuse_what_one_has_met(in_processes, odd, message, position):
    examples = labelled(0, 10)
    examples[position] = odd
    records = Counted(examples)
    errors = in_processes(3, lambda number: sources._read("toy", records, "RGB"))
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert isinstance(error, ValueError)
        assert re.search(message, str(error))
