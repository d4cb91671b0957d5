"""Every experiment with `JAX_ENABLE_X64=1`, as a user runs it, ends with its table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = "--seeds=1 --width=0.1 --report_every=4 --noprogress"
COMMANDS = {
    "prune": f"{TINY} --steps=8 --refresh_interval=2"
    " --methods=rigl,one_shot --sparsity=0.5,0.75",
    "d2_sparse": f"{TINY} --steps=8 --refresh_interval=2 --rounds=1",
    "lottery": f"{TINY} --steps=8 --rounds=1",
    "anytime": f"{TINY} --samples_per_class=10 --megabatches=2 --epochs=1",
    "low_data": f"{TINY} --steps=8 --refresh_interval=2 --samples_per_class=5"
    " --methods=dense,rigl,d2_sparse",
    "scaling": "--nocheck",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_experiments_end_with_a_table_in_64_bits(name, tmp_path):
    words = COMMANDS[name].split()
    if name != "scaling":
        words.append(f"--workdir={tmp_path / 'run'}")
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *words],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| :--" in done.stdout, done.stdout
