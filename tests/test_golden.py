"""What the experiments found before they were rewritten, and find now.

golden/golden.json holds one record a run (or a round, or a stage of a stream) of small
runs of all experiments, made by the code of version 0.1. Its field `weights` is the
sha256 of the final parameters; on the machine that it was made on networks that are
trained alone have the same bits today. Here numbers of weights are compared exactly,
accuracies as far as processors differ.

    python tests/test_golden.py [CASE ...]    # weights to the bit; what has moved
"""

import collections
import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import runs

from d2sparse import tree
from d2sparse.study import runner

RECORDS = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
SHORT = {"steps": 40, "report_every": 20}
MOVING = SHORT | {"refresh_interval": 5}
PRUNED = (
    *("dense", "random", "static", "one_shot", "gradual", "movement", "set", "rigl"),
    *("sparse_momentum", "granet", "ac_dc", "top_kast", "str", "powerprop"),
    *("snip", "grasp", "synflow", "fisher", "wanda"),
)
SCORES = {"score": ("magnitude", "random")}
LOTTERY = SHORT | {"rounds": 2, "sparsity": 0.9, "axes": SCORES}
BUDGET = {"samples_per_class": (10,), "label_noise": (0.0,), "imbalance": (1.0,)}
STREAM = {"megabatches": 3, "epochs": 2, "samples_per_class": 20, "batch_size": 8}
# The experiment and the flags of every case, as they are today.
CASES = {
    "prune": ("prune", MOVING | {"methods": PRUNED, "axes": {"sparsity": (0.8, 0.9)}}),
    "prune-sr_ste": (
        "prune",
        {**SHORT, "methods": ("sr_ste",), "axes": {"sparsity": (0.5,)}},
    ),
    "d2_sparse": ("d2_sparse", MOVING | {"rounds": 2}),
    "d2_sparse-symmetric": (
        "d2_sparse",
        MOVING | {"methods": ("d2_sparse",), "preset": "symmetric"},
    ),
    "d2_sparse-set": (
        "d2_sparse",
        {**MOVING, "methods": ("d2_sparse",), "pair_rule": "set"},
    ),
    "d2_sparse-static": (
        "d2_sparse",
        {**MOVING, "methods": ("d2_sparse",), "pair_rule": "static"},
    ),
    "lottery": ("lottery", LOTTERY),
    "lottery-learning_rate": ("lottery", LOTTERY | {"rewinding": "learning_rate"}),
    "lottery-freeze": ("lottery", LOTTERY | {"methods": ("rise",)}),
    "low_data": ("low_data", MOVING | {"rounds": 2, "axes": BUDGET}),
    "low_data-noise": (
        "low_data",
        MOVING
        | {"methods": ("dense", "rigl")}
        | {"axes": BUDGET | {"label_noise": (0.0, 0.2)}},
    ),
    "anytime": ("anytime", STREAM),
    "anytime-compat": ("anytime", STREAM | {"methods": ("app",), "compat": "app-2022"}),
}


def hash_of(params):
    digest = hashlib.sha256()
    for _, leaf in sorted(tree.flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def run_case(case, workdir, **changes):
    """The results of all runs of a case, with the hashes of what was judged."""
    experiment, flags = CASES[case]
    module = importlib.import_module(f"experiments.{experiment}")
    if case == "anytime":
        flags = {**flags, "methods": tuple(anytime_methods())}
    hashes = collections.defaultdict(list)

    def judged(plan, program, state, splits):
        found = judge(plan, program, state, splits)
        hashes[found["nll"]].append(hash_of(state.params))
        return found

    judge, runner.judge = runner.judge, judged
    try:
        config = module.Config(
            seeds=2, progress=False, workdir=str(workdir), **{**flags, **changes}
        )
        module.run(config)
    finally:
        runner.judge = judge
    found = {}
    for path in sorted((Path(workdir) / "units").glob("*.json")):
        results = json.loads(path.read_text())
        seed = int(path.stem.rpartition("seed")[2])
        for number, part in enumerate(results["parts"] or [results]):
            weights = hashes.get(part["nll"], [""])[0]
            key = (name_of(results), seed, number if results["parts"] else None)
            found[key] = {**part, "weights": weights}
    return found


def anytime_methods():
    return dict.fromkeys(r["method"] for r in RECORDS if r["case"] == "anytime")


def name_of(results):
    """A run by its method and values, as the records name it."""
    values = results["values"]
    method = {"imp": values.get("score"), "rise": values.get("score")}
    asked = values.get("sparsity"), values.get("label_noise") or None
    return (method.get(results["method"]) or results["method"], *asked)


def record_of(record):
    """The same of a record."""
    noise = record["unit"].rpartition("noise")[2] if "noise" in record["unit"] else ""
    name = (record["method"], record["sparsity"], float(noise) if noise else None)
    return (name, record["seed"], record.get("round", record.get("stage")))


def records_of(case):
    return [r for r in RECORDS if r["case"] == case and "unit" in r]


def compared(case, found):
    """Pairs of a record and what was found in its place."""
    by_name = {}
    for (name, seed, number), part in found.items():
        by_name[(name, seed, number)] = part
        by_name[(name, seed, None)] = part  # The last part is the whole.
    return [(record, by_name[record_of(record)]) for record in records_of(case)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_experiments_find_what_they_found(case, tmp_path):
    pairs = compared(case, run_case(case, tmp_path / "run"))
    assert len(pairs) == len(records_of(case)) > 0
    for record, part in pairs:
        assert abs(part["accuracy"] - record["accuracy"]) < 0.1
        np.testing.assert_allclose(part["nonzeros"], record["nonzeros"], atol=20)


def test_rigl_finds_what_it_found(tmp_path):
    changes = {"methods": ("rigl",), "axes": {"sparsity": (0.8,)}}
    with runs.quick_compilation(), runs.blank_figures():
        found = run_case("prune", tmp_path / "run", **changes)
    for (name, seed, _), part in found.items():
        (record,) = [r for r in records_of("prune") if record_of(r)[:2] == (name, seed)]
        assert part["nonzeros"] == record["nonzeros"]
        np.testing.assert_allclose(part["nll"], record["nll"], rtol=0.02)
        np.testing.assert_allclose(part["training_macs"], record["training_macs"])
    assert len(found) == 2


def main(cases):
    for case in cases or CASES:
        with tempfile.TemporaryDirectory() as workdir:
            pairs = compared(case, run_case(case, f"{workdir}/run"))
        moved = [
            f"  {r['unit']} seed {r['seed']} {r.get('round', r.get('stage', ''))}: "
            f"accuracy {r['accuracy']:.4f} -> {part['accuracy']:.4f}, "
            f"NLL {r['nll']:.6f} -> {part['nll']:.6f}, "
            f"MACs {r['training_macs']:.0f} -> {part['training_macs']:.0f}"
            for r, part in pairs
            if r["weights"] != part["weights"]
            or abs(r["training_macs"] / part["training_macs"] - 1) > 1e-6
        ]
        print(f"{case}: {len(pairs)} records, {len(moved)} differ", *moved, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
