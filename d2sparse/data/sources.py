"""Image classification data sets in memory, each with its official test split.

`"digits"`, the handwritten digits of scikit-learn, is embedded and needs no network.
Any other name is a data set of TensorFlow Datasets (TFDS), read from a folder where
it was prepared as array_record files. Reading needs no TensorFlow; preparing does. In a
run of several processes each reads a share of the records, and all get all examples.
"""

import difflib
import io
import itertools
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from d2sparse import disk
from d2sparse.checks import optional
from d2sparse.data.arrays import Source, Split

_DIGITS_TEST_PER_CLASS = 50
_CHUNK = 4096
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Reads a whole image classification data set into memory.

    `"digits"` is 1797 images of 8 x 8 with grey levels 0 to 16, scaled to 0 to 255. It
    has no official split, so one is fixed here: of the n examples of a class, in the
    order of scikit-learn, those at positions floor(i n / 50) for i = 0 ... 49 are test
    (500 in all) and the other 1297 are train. No seed enters.

    Any other name is read from a prepared TFDS folder. A data set without a `test`
    split is tested on its `validation` split. Nothing is ever downloaded.

    Args:
      name: `"digits"`, or a TFDS name such as `"cifar10"`, `"svhn_cropped"`,
        `"imagenet_resized/32x32"` or `"mnist:3.0.1"`. Without a version the latest
        prepared one is taken.
      data_dir: folder of prepared TFDS data sets; by default `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`. It is on a local or mounted file system.

    Raises:
      ValueError: the name is unknown; the folder does not exist, lacks the data set, or
        holds it in another file format; or it is not image classification with train
        and test splits of labelled uint8 images of one size.

    >>> digits = load("digits")
    >>> digits.train.images.shape, digits.test.images.shape, digits.num_classes
    ((1297, 8, 8, 1), (500, 8, 8, 1), 10)
    """
    if name == "digits":
        return _digits()
    # TFDS takes half a second to import, and an embedded source does not need it.
    with optional(__name__):
        import tensorflow_datasets as tfds

    builder = _open(name, data_dir)
    mode, num_classes = _check_features(name, builder.info.features)
    held_out = _test_split(name, list(builder.info.splits))
    encoded = {"image": tfds.decode.SkipDecoding()}

    def read(split: str) -> Split:
        records = builder.as_data_source(split, decoders=encoded)
        return _read(f"{name}/{split}", records, mode)

    return Source(name, read("train"), read(held_out), num_classes)


def _digits() -> Source:
    with optional(__name__):
        from sklearn.datasets import load_digits

    grey_levels, labels = load_digits(return_X_y=True)
    images = np.round(grey_levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        positions = np.arange(_DIGITS_TEST_PER_CLASS) * len(members)
        is_test[members[positions // _DIGITS_TEST_PER_CLASS]] = True
    labels = labels.astype(np.int32)
    train = Split(images[~is_test], labels[~is_test])
    test = Split(images[is_test], labels[is_test])
    return Source("digits", train, test, num_classes=10)


def _open(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The TFDS builder of a prepared data set."""
    import tensorflow_datasets as tfds

    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = disk.local_path(data_dir or default, "data_dir")
    folder = _find(name, root)
    builder = tfds.builder_from_directory(folder)
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(
            f"expected {name!r} as array_record files, got {formats} in {folder}; "
            f"delete that folder or choose another data_dir, then {_recipe(name, root)}"
        )
    return builder


def _find(name: str, root: pathlib.Path) -> pathlib.Path:
    """The folder of the latest prepared version.

    It is found by the layout `root/name/config/version` and not by `tfds.builder`,
    which for a missing data set asks the network, and for a present one insists on the
    version that the installed TFDS would prepare.
    """
    import tensorflow_datasets as tfds

    start = root / name.replace(":", "/")
    # Not `**`, which would not follow links to folders kept elsewhere.
    depths = ("", "*/", "*/*/") if name else ()
    files = [file for depth in depths for file in start.glob(f"{depth}features.json")]
    folders = [file.parent for file in files]
    folders = [path for path in folders if tfds.core.Version.is_valid(path.name)]
    if not folders:
        raise ValueError(_why_missing(name, root))
    configs = sorted({path.parent.relative_to(root).as_posix() for path in folders})
    if len(configs) > 1:
        raise ValueError(
            f"{name!r} has several configurations in {root}; expected one of {configs}"
        )
    return max(folders, key=lambda path: tfds.core.Version(path.name))


def _why_missing(name: str, root: pathlib.Path) -> str:
    import tensorflow_datasets as tfds

    present = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    named = tfds.list_builders(with_community_datasets=False)
    known = {"digits", *named, *present}
    if name.partition(":")[0].partition("/")[0] not in known:
        close = difflib.get_close_matches(name.lower(), sorted(known))
        return (
            f"expected 'digits' or a TFDS name, got the unknown data set {name!r}; "
            f"close matches: {close}"
        )
    if not root.is_dir():
        return f"data_dir {root} does not exist; to make it, {_recipe(name, root)}"
    shown = ", ".join(present[:6]) + ", ..." * (len(present) > 6) or "nothing"
    return (
        f"data_dir {root} lacks a prepared {name!r}, it has {shown}; "
        f"{_recipe(name, root)}"
    )


def _recipe(name: str, root: pathlib.Path) -> str:
    builder = f'tfds.builder("{name}", data_dir="{root}", file_format="array_record")'
    return (
        "prepare it once with `pip install tensorflow tensorflow-datasets` and "
        "`python -c 'import tensorflow_datasets as tfds; "
        f"{builder}.download_and_prepare()'`"
    )


def _check_features(name: str, features: Any) -> tuple[str, int]:
    """PIL mode of the images and number of classes."""
    import tensorflow_datasets as tfds

    found = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise ValueError(
            "expected an image classification data set with features 'image' (Image) "
            f"and 'label' (ClassLabel), got {name!r} with {features}"
        )
    mode = _PIL_MODES.get(image.shape[-1])
    if image.np_dtype != np.uint8 or mode is None:
        raise ValueError(
            "expected uint8 images with 1, 3 or 4 channels, got "
            f"{np.dtype(image.np_dtype)} of shape {image.shape} in {name!r}"
        )
    return mode, label.num_classes


def _test_split(name: str, splits: list[str]) -> str:
    held_out = "test" if "test" in splits else "validation"
    if "train" not in splits or held_out not in splits:
        raise ValueError(
            f"expected splits 'train' and 'test' (or 'validation'), got {name!r} with "
            f"{splits}"
        )
    return held_out


def _read(name: str, records: Any, mode: str) -> Split:
    """All examples, of which each process reads and decodes its share."""
    shares = _shares(len(records), jax.process_count())
    images, labels, own_sizes = _read_share(records, shares[jax.process_index()], mode)
    # Every process comes to know of every problem, so that none waits for another.
    sizes = _distinct(_gather(own_sizes).reshape(-1, 3))
    if len(sizes) > 1:
        raise ValueError(
            f"expected images of one size, got {sizes[0]} and {sizes[1]} in {name}; "
            "choose a data set of equal images or resize it beforehand"
        )
    labels = _put_together(labels, shares)
    if labels.min() < 0:
        raise ValueError(f"expected every example to have a label, got -1 in {name}")
    return Split(_put_together(images.reshape(-1, *sizes[0]), shares), labels)


def _shares(count: int, processes: int) -> list[range]:
    """Which records each process reads: blocks that differ by one in length at most.

    >>> _shares(10, 4)
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
    """
    ends = [count * number // processes for number in range(processes + 1)]
    return [range(*block) for block in itertools.pairwise(ends)]


def _read_share(
    records: Any, share: range, mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and labels of some records, and two sizes of images: the first and last.

    It stops after an image of another size than the first. Without records there are no
    sizes, which are zeros then.
    """
    images, labels = np.empty((0, 0), np.uint8), np.zeros(len(share), np.int32)
    sizes = np.zeros((2, 3), np.int32)
    for start in range(0, len(share), _CHUNK):
        # TFDS reads a batch of records about twice as fast as one after the other.
        chunk = records.__getitems__(share[start : start + _CHUNK])
        for i, record in enumerate(chunk, start):
            image = _decode(record["image"], mode)
            if i == 0:
                images = np.empty((len(share), *image.shape), np.uint8)
                sizes[0] = image.shape
            sizes[1] = image.shape
            if image.shape != images.shape[1:]:
                return images, labels, sizes
            images[i], labels[i] = image, record["label"]
    return images, labels, sizes


def _distinct(sizes: np.ndarray) -> list[tuple[int, ...]]:
    """Sizes in the order they are met."""
    return [size for size in dict.fromkeys(map(tuple, sizes.tolist())) if any(size)]


def _put_together(own: np.ndarray, shares: list[range]) -> np.ndarray:
    """The rows of all processes in the order of their shares; `own` are those of this.

    They pass through the devices, which is why only a chunk of them does at a time.
    """
    if len(shares) == 1:
        return own
    whole = np.empty((shares[-1].stop, *own.shape[1:]), own.dtype)
    for start in range(0, max(map(len, shares)), _CHUNK):
        blocks = [share[start : start + _CHUNK] for share in shares]
        rows = np.zeros((max(map(len, blocks)), *own.shape[1:]), own.dtype)
        mine = own[start : start + _CHUNK]
        rows[: len(mine)] = mine
        for block, gathered in zip(blocks, _gather(rows), strict=True):
            whole[block.start : block.stop] = gathered[: len(block)]
    return whole


def _gather(own: np.ndarray) -> np.ndarray:
    """What all processes have, one after the other along a new first axis."""
    if jax.process_count() == 1:
        return own[None]
    return np.asarray(multihost_utils.process_allgather(own))


def _decode(encoded: bytes, mode: str) -> np.ndarray:
    # Pillow alone, so that a JPEG has the same pixels whether OpenCV, which TFDS
    # prefers, is installed or not; it also takes half the time of TFDS's decoder.
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)
