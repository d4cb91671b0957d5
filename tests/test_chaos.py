"""Runs that are killed: the short form of `make chaos`."""

import pytest
import runs


@pytest.mark.slow
def test_a_killed_run_comes_to_the_same_end(tmp_path):
    out = tmp_path / "report.md"
    words = ["--kills=1", "--only=compare: dense", f"--out={out}"]
    done = runs.script("tests/chaos", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, total = [line for line in out.read_text().splitlines() if "|" in line]
    cells = [cell.strip() for cell in total.strip("|").split("|")]
    assert cells[:2] == ["all", "1"]
    assert cells[-1] == "0"
