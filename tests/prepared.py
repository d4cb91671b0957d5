"""Prepared data sets and trained networks beside the checkout, which few machines have.

Tests that need them skip, with what is missing as their reason.
"""

import json
import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
PREPARED = Path(os.environ.get("TFDS_DATA_DIR") or SHARED / "tfds")


def prepared_version(name):
    """The newest prepared folder of a real data set; skips where there is none."""
    folders = sorted(file.parent for file in PREPARED.glob(f"{name}/*/features.json"))
    if not folders:
        pytest.skip(
            f"needs a prepared {name} in TFDS_DATA_DIR or in ../shared/tfds next to "
            "the checkout"
        )
    return folders[-1]


def shortened(name, root, **lengths):
    """A data_dir with the real files of a data set, cut to their first records."""
    version = prepared_version(name)
    folder = root / name / version.name
    folder.mkdir(parents=True)
    for file in version.iterdir():
        if file.name != "dataset_info.json":
            (folder / file.name).symlink_to(file.resolve())
    info = json.loads((version / "dataset_info.json").read_text())
    for split in info["splits"]:
        shards = [int(length) for length in split["shardLengths"]]
        length = lengths.get(split["name"], sum(shards))
        cut = [min(n, max(0, length - sum(shards[:i]))) for i, n in enumerate(shards)]
        split["shardLengths"] = [str(n) for n in cut]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return root


def trained_network(name):
    """The file of a trained network; skips where there is none."""
    file = SHARED / "models" / name
    if not file.is_file():
        pytest.skip(f"needs the file {name} in ../shared/models next to the checkout")
    return file
