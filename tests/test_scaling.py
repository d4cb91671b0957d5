"""What refreshes communicate on many devices: formulae against compiled programs."""

import doctest
import functools
import importlib
import math
import pkgutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from d2sparse.masks import dense_masks
from experiments import scaling
from experiments.scaling import formulae, leaves
from experiments.scaling.compiled import (
    Collective,
    collectives,
    compile_refresh,
    compile_sort,
    compiled_traffic,
)
from experiments.scaling.formulae import METHODS, Traffic
from experiments.scaling.tables import CHECKED, CHECKED_WIDE, bytes_table

KEY = jax.random.key(0)
# Compiling takes nearly all the time: every method with every number of devices, but
# not with every tree.
MORE = [
    *(("small", "RigL", n) for n in (2, 4)),
    ("small", "magnitude, each leaf", 4),
    ("small", "magnitude, global", 2),
]
CASES = [
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (*(("small", method, 8) for method in METHODS), *MORE)
    ),
    ("wide", "magnitude, each leaf", 2),
    ("wide", "magnitude, global", 4),
    ("wide", "RigL", 8),
    ("mixed", "magnitude, global", 8),
]
TREES = {
    "small": CHECKED,
    "wide": CHECKED_WIDE,
    "mixed": {"a": (512, 512), "b": (16, 3)},
}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(scaling.__path__, "experiments.scaling.")
]


@functools.cache
def compiled(model, method, devices):
    shardings = leaves.make_shardings(TREES[model], devices)
    return compile_refresh(METHODS[method], TREES[model], shardings)


def operations_of(program):
    return collectives(program.as_text())


def normals(seed, shapes):
    rng = np.random.default_rng(seed)
    return {p: rng.standard_normal(s, np.float32) for p, s in shapes.items()}


# Formulae and compiled programs


@pytest.mark.parametrize(("model", "method", "devices"), CASES)
def test_the_formula_is_what_the_compiled_program_communicates(model, method, devices):
    operations = operations_of(compiled(model, method, devices))
    expected = formulae.traffic(METHODS[method], TREES[model], devices)
    assert compiled_traffic(operations) == expected
    assert expected.bytes_a_pass > 0
    assert {operation.kind for operation in operations} == {"all-reduce"}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_size_of_the_scores_is_communicated(method):
    wide = TREES["wide"]["a"]
    devices = {"magnitude, each leaf": 2, "magnitude, global": 4, "RigL": 8}[method]
    for operation in operations_of(compiled("wide", method, devices)):
        assert max(operation.sizes) <= formulae.WORD < math.prod(wide)


@pytest.mark.parametrize(("model", "method", "devices"), CASES)
def test_the_memory_is_within_its_formulae(model, method, devices):
    memory = compiled(model, method, devices).memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say")
    held = leaves.local_weights(TREES[model], devices)
    # Masks and weights; where weights grow, gradients as well; a key.
    given = held * (1 + formulae.WORD * METHODS[method].searches)
    assert 0 <= memory.argument_size_in_bytes - given <= 16
    pointers = memory.output_size_in_bytes - held
    assert 0 <= pointers <= 8 * len(TREES[model])
    least, most = formulae.temporary_bounds(TREES[model], devices)
    assert least <= memory.temp_size_in_bytes <= most


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        *((method, (8,)) for method in METHODS),
        pytest.param("RigL", (2, 4), marks=pytest.mark.slow),
        pytest.param("magnitude, each leaf", (4,), marks=pytest.mark.slow),
        pytest.param("magnitude, global", (2,), marks=pytest.mark.slow),
    ],
)
def test_sharded_masks_are_those_of_one_device(method, counts):
    params, grads = normals(1, CHECKED), normals(2, CHECKED)
    rule = METHODS[method].rule
    begin = rule.init(params, KEY) if method == "RigL" else dense_masks(params)
    expected = jax.jit(rule.update)(begin, params, grads, 0, KEY)
    live = sum(int(mask.sum()) for mask in expected.values())
    assert 0 < live < leaves.num_weights(CHECKED) / 2
    for devices in counts:
        put = leaves.make_shardings(CHECKED, devices)
        arguments = jax.device_put((begin, params, grads), (put, put, put))
        whole = NamedSharding(put["d"].mesh, PartitionSpec())
        key = jax.device_put(KEY, whole)
        step = jax.device_put(np.int32(0), whole)
        masks = compiled("small", method, devices)(*arguments, step, key)
        for path, mask in masks.items():
            assert mask.sharding.is_equivalent_to(put[path], mask.ndim)
            np.testing.assert_array_equal(mask, expected[path])


def test_replicated_leaves_communicate_nothing():
    shapes = {"a": (8, 6)}
    mesh = leaves.make_shardings(shapes, 8)["a"].mesh
    replicated = {"a": NamedSharding(mesh, PartitionSpec())}
    assert operations_of(compile_refresh(METHODS["RigL"], shapes, replicated)) == []
    assert formulae.traffic(METHODS["RigL"], {"a": (7, 5)}, 8) == Traffic(0, 0, 0, 0)


def test_runs_on_devices_of_their_own_send_a_byte_a_check():
    mesh = jax.make_mesh((4,), ("run",), (AxisType.Auto,))
    put = NamedSharding(mesh, PartitionSpec("run"))
    weights = {"a": jax.ShapeDtypeStruct((4, 8, 6), np.float32, sharding=put)}
    masks = {"a": jax.ShapeDtypeStruct((4, 8, 6), bool, sharding=put)}
    keys = jax.device_put(jax.random.split(KEY, 4), put)
    update = METHODS["magnitude, global"].rule.update
    refresh = jax.jit(jax.vmap(update, in_axes=(0, 0, 0, None, 0)))
    program = refresh.lower(masks, weights, weights, np.int32(0), keys).compile()
    check = Collective("all-reduce", (1,), in_search=True)
    assert operations_of(program) == [check, check]


@pytest.mark.parametrize(
    "devices", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))]
)
def test_sorting_gathers_what_the_formula_says(devices):
    shardings = leaves.make_shardings(CHECKED, devices)
    gathers = operations_of(compile_sort(CHECKED, shardings))
    assert {operation.kind for operation in gathers} == {"all-gather"}
    scores = formulae.gathered_bytes(METHODS["magnitude, global"], CHECKED, devices)
    assert sum(sum(operation.sizes) for operation in gathers) == scores


# Reading compiled programs


def test_collectives_are_found_in_loops_branches_and_lists():
    text = """\
HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: s32[], b: s32[]) -> s32[] {
  ROOT %add = s32[] add(%a, %b)
}

%branch.1 (x: bf16[2,3]) -> bf16[2,3] {
  ROOT %p = bf16[2,3]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%body (x: s32[4]) -> s32[4] {
  %r = (s32[4]{0}, pred[]) all-reduce(%x, %y), to_apply=%sum, replica_groups={{0,1}}
}

%open (x: s32[4]) -> pred[] {
  ROOT %c = pred[] all-reduce-start(%x), to_apply=%sum
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[4]) while(%t), condition=%sum, body=%body, backend_config={\
"known_trip_count":{"n":"3"}}
  %v = (s32[4]) while(%t), condition=%open, body=%sum
  %c = bf16[2,3] conditional(%i, %x, %x), branch_computations={%branch.1, %sum}
  ROOT %g = f32[8]{0} all-gather(%x), dimensions={0}
}
"""
    assert collectives(text) == [
        *3 * [Collective("all-reduce", (16, 1), in_search=False)],
        Collective("all-reduce", (1,), in_search=True),
        Collective("collective-permute", (12,), in_search=False),
        Collective("all-gather", (32,), in_search=False),
    ]


# Trees and tables


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"METHODS": METHODS}).failed == 0


def test_the_trees_have_the_weights_of_the_published_networks():
    vit, llama = leaves.vit_l(), leaves.llama_7b()
    dense = 24 * (9216 + 4 * 1024) + 2 * 1024 + (197 + 1) * 1024 + 1024 + 1000
    assert leaves.num_weights(vit) + dense == 304_326_632
    assert leaves.num_weights(llama) + 65 * 4096 == 6_738_415_616
    norms_and_bias = 2 * 26_560 + 1000
    assert leaves.num_weights(leaves.resnet50()) + norms_and_bias == 25_557_032


def test_the_tables_of_the_documentation_are_those_of_the_command(capsys):
    tables = scaling.run(scaling.Config(check=False))
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    printed = capsys.readouterr().out
    assert list(tables) == ["bytes", "time", "memory"]
    for part in printed.strip().split("\n\n"):
        assert part in text


def test_a_budget_of_too_many_weights_is_refused_in_the_table():
    table = bytes_table({"7 B": leaves.llama_7b()})
    rows = {row["refresh"]: row for row in table.rows}
    assert rows["magnitude, global"]["MB, at most"] == "refused"
    rule, key = METHODS["magnitude, global"].rule, jax.eval_shape(lambda: KEY)
    leaf = jax.ShapeDtypeStruct((2**16, 2**15), np.float32)
    masks = {"a": jax.ShapeDtypeStruct(leaf.shape, bool)}
    with pytest.raises(ValueError, match="expected fewer than 2\\*\\*31 scores"):
        jax.eval_shape(rule.update, masks, {"a": leaf}, {"a": leaf}, 0, key)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"devices": ()}, "expected at least 1 device"),
        ({"devices": (8, 0)}, "expected at least 1 device"),
        ({"latency_us": -1.0}, "expected a latency of at least 0"),
        ({"bandwidth_gb": 0.0}, "a bandwidth above 0"),
    ],
)
def test_flags_out_of_their_range_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        scaling.run(scaling.Config(**flags))


def test_too_few_devices_to_compile_for_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="expected 8 devices to compile for, got 1"):
        scaling.run(scaling.Config())
