"""Records what the experiments found before they were rewritten: golden.json.

    JAX_PLATFORMS=cpu MPLBACKEND=Agg python tests/golden/record_old.py PATH [CASE ...]

From the root of the repository, in one process for all cases that are named; all of
them where none is. Records of a case replace those that PATH has of it.

golden.json is a list of records, one a line. A record is one finished (or failed) unit,
or one round or stage of it:

- `case`: the run it is of, a key of `CASES`, which has the flags in full.
- `experiment`: the module of `experiments`, whose flags are `flags`: those that differ
  from the defaults of its `Config`, by their names of then; all that choose what is run
  (`rules`, `methods`, `score`, `sparsities`) and `workdir`, `progress` are left out.
- `unit`: the name of then of what was run, which `seed` is added to: RULE-SPARSITY in
  prune, METHOD in d2_sparse and anytime, SCORE in lottery, METHOD-LABELS[-noiseRATE] in
  low_data, and METHOD-LABELS-trialN with --tune.
- `method`: the rule, method or score, without the rest of the unit's name.
- `sparsity`: the one that was asked for in prune; null elsewhere, where it is a flag.
- `round` in lottery, from 0, which is dense; `stage` in anytime, from 0.
- the results as they were recorded, less seconds; null is a number that is not finite.
  `found_sparsity` is the measured one, which the results call sparsity.
- `weights`: sha256 of the parameters that count in the end, those of the state that
  `units.judge` is given (averages, where there are any). Leaves come in the order of
  their sorted paths; of each its dtype, its shape and its bytes are hashed, and not its
  name. `parts` hashes every network alone, where there are several: `fast` and `slow`
  of a pair, `0`, `1`, ... of an ensemble.
- `failed` in place of the results: why there are none.
- `values` and `chosen` of a trial: what was drawn for it, and whether it has won. A
  record of its own has the whole of tuned.json in `tuned`.

Programs are compiled with XLA's default optimisations, for one CPU device; tests run
under others (`conftest.py`).
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from d2sparse import dual, records, tree
from d2sparse.records.encoding import to_json
from experiments import anytime, d2_sparse, lottery, low_data, prune, units
from experiments.few_labels.cells import parse_cell
from experiments.megabatches.options import LEARNERS
from experiments.recipes import RECIPES
from experiments.task import given

MODULES = {
    "prune": prune,
    "d2_sparse": d2_sparse,
    "low_data": low_data,
    "lottery": lottery,
    "anytime": anytime,
}
SHARED = {"seeds": 2, "progress": False}
SHORT = {"steps": 40, "report_every": 20}
MOVING = SHORT | {"refresh_interval": 5}
STREAM = {"megabatches": 3, "epochs": 2, "samples_per_class": 20, "batch_size": 8}
PAIR = MOVING | {"methods": ("d2_sparse",)}
RULES = tuple(name for name in RECIPES if name not in ("fixed", "sr_ste"))
TUNING = MOVING | {"steps": 20, "tune": True, "trials": 3, "tuning_seeds": 1}
# The flags of every run by its name: the experiment, then what differs.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "prune": ("prune", MOVING | {"rules": RULES, "sparsities": (0.8, 0.9)}),
    "prune-sr_ste": (
        "prune",
        MOVING | {"rules": ("sr_ste",), "sparsities": (0.5,), "group": 4},
    ),
    "d2_sparse": ("d2_sparse", MOVING | {"imp_rounds": 2}),
    "d2_sparse-consolidated": ("d2_sparse", PAIR | {"mode": "consolidated"}),
    "d2_sparse-symmetric": ("d2_sparse", PAIR | {"preset": "symmetric"}),
    "d2_sparse-set": ("d2_sparse", PAIR | {"pair_rule": "set"}),
    "d2_sparse-static": ("d2_sparse", PAIR | {"pair_rule": "static"}),
    "lottery": ("lottery", SHORT | {"rounds": 2, "sparsity": 0.9}),
    "lottery-learning_rate": (
        "lottery",
        SHORT | {"rounds": 2, "sparsity": 0.9, "rewinding": "learning_rate"},
    ),
    "lottery-freeze": (
        "lottery",
        SHORT | {"rounds": 2, "sparsity": 0.9, "losers": "freeze"},
    ),
    "anytime": ("anytime", STREAM | {"methods": LEARNERS}),
    "anytime-compat": (
        "anytime",
        STREAM | {"methods": ("app",), "compat": "app-2022"},
    ),
    "low_data": ("low_data", MOVING | {"imp_rounds": 2, "budgets": (10,)}),
    "low_data-noise": (
        "low_data",
        MOVING
        | {"methods": ("dense", "rigl"), "budgets": (10,), "label_noises": (0.2,)},
    ),
    "low_data-tune": (
        "low_data",
        TUNING | {"methods": ("dense", "rigl"), "budgets": (10,)},
    ),
}
LEFT_OUT = {"rules", "methods", "score", "sparsities", "workdir", "progress"}
Record = dict[str, Any]


def hash_of(params: Any) -> str:
    """Of all leaves: dtype, shape and bytes, in the order of their sorted paths."""
    digest = hashlib.sha256()
    for _, leaf in sorted(tree.flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def hashes(params: Any) -> dict[str, Any]:
    """Of all networks together, and of each where there are several."""
    found: dict[str, Any] = {"weights": hash_of(params)}
    if isinstance(params, dual.Dual):
        parts = params._asdict()
    elif isinstance(params, tuple):
        parts = dict(enumerate(params))
    else:
        return found
    return found | {"parts": {str(name): hash_of(own) for name, own in parts.items()}}


class Capture:
    """Stands between an experiment and its records; notes what is judged."""

    def __init__(self) -> None:
        self.records: list[tuple[records.Unit, Any, list[Any]]] = []
        self._judged: list[Any] = []
        self._judge, self._finish = units.judge, records.Run.finish

    def __enter__(self) -> "Capture":
        def judge(method: Any, state: Any, splits: Any) -> Any:
            self._judged.append(hashes(state.params))
            return self._judge(method, state, splits)

        def finish(run: Any, unit: records.Unit, results: Any) -> None:
            self.records.append((unit, to_json(results), self._judged))
            self._judged = []
            self._finish(run, unit, results)

        units.judge, records.Run.finish = judge, finish
        return self

    def __exit__(self, *_: object) -> None:
        units.judge, records.Run.finish = self._judge, self._finish


def run(case: str) -> list[Record]:
    """The records of a case."""
    experiment, flags = CASES[case]
    module = MODULES[experiment]
    with tempfile.TemporaryDirectory() as workdir, Capture() as capture:
        config = module.Config(**(SHARED | flags), workdir=f"{workdir}/run")
        summary = module.run(config)
        trials = _trials(Path(config.workdir)) if flags.get("tune") else {}
    own = {k: v for k, v in given(config).items() if k not in LEFT_OUT}
    about = {"case": case, "experiment": experiment, "flags": own}
    found = []
    for unit, results, judged in capture.records:
        place = about | _place(experiment, unit)
        extra = trials.get(unit.method, {})
        found += [place | part | extra for part in _parts(results, judged)]
    if trials:
        found.append(about | {"tuned": summary})
    return found


def _place(experiment: str, unit: records.Unit) -> Record:
    """Which unit it is."""
    method, sparsity = unit.method, None
    if experiment == "prune" and "-" in method:
        method, _, asked = method.partition("-")
        sparsity = float(asked)
    if experiment == "low_data":
        method = parse_cell(method.partition("-trial")[0]).method
    return {
        "unit": unit.method,
        "method": method,
        "sparsity": sparsity,
        "seed": unit.seed,
    }


def _parts(results: Record, judged: list[Any]) -> list[Record]:
    """The rounds or stages of a unit, or all of it, with the hashes."""
    if "failed" in results:
        return [dict(results)]
    for one, many in {"round": "rounds", "stage": "stages"}.items():
        if many in results:
            pairs = list(zip(results[many], judged, strict=True))
            return [
                {one: n} | _numbers(own) | hashed
                for n, (own, hashed) in enumerate(pairs)
            ]
    [hashed] = judged
    return [_numbers(results) | hashed]


def _numbers(results: Record) -> Record:
    names = {"sparsity": "found_sparsity"}
    return {names.get(k, k): v for k, v in results.items() if k != "seconds"}


def _trials(workdir: Path) -> dict[str, Record]:
    """What was drawn for every trial, and which has won."""
    summary = json.loads((workdir / "tuning" / "summary.json").read_text())
    return {
        row["trial"]: {"values": row["values"], "chosen": row["chosen"]}
        for row in summary["trials"]
    }


def save(path: Path, found: list[Record]) -> None:
    """Adds records in the place of others of their cases."""
    known = json.loads(path.read_text()) if path.exists() else []
    new = {record["case"] for record in found}
    every = [record for record in known if record["case"] not in new] + found
    order = list(CASES)
    every.sort(key=lambda record: order.index(record["case"]))
    lines = ",\n".join(json.dumps(record) for record in every)
    path.write_text(f"[\n{lines}\n]\n")


def main(path: str, *names: str) -> None:
    """Runs the cases that are named, and saves after each."""
    for name in names or CASES:
        save(Path(path), run(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
