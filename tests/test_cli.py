"""The command line: flags, help, refused input, exit status."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import demo_experiment
import jax
import pytest
from absl import flags
from demo_experiment import Config
from simple_parsing.docstring import get_attribute_docstring

from d2sparse.study import cli

TESTS = Path(__file__).parent
EXPERIMENTS = [
    ".".join(path.relative_to(TESTS.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )
    for path in sorted((TESTS.parent / "experiments").rglob("*.py"))
    if "\nclass Config" in path.read_text()
]


def parse(*words):
    return cli.parse_flags(Config, ["demo", *words])


def command(*words, **variables):
    """Runs the demo as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "demo_experiment", *words],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


STOPPED = (
    "stopped by SIGINT; to go on where it stopped, run the same command again:\n"
    "    python -m demo_experiment --steps=0\n"
)


@pytest.fixture
def without_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture
def cache_home(monkeypatch, tmp_path):
    """A cache directory of its own, and the configuration as it was afterwards."""
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_no_flags_give_the_defaults():
    assert parse() == Config()


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--sparsity=1e-1"], "sparsity", 0.1),
        (["--sparsity", "-1"], "sparsity", -1.0),
        (["--seed=7"], "seed", 7),
        (["--methods=set"], "methods", ("set",)),
        (["--methods=set, rigl"], "methods", ("set", "rigl")),
        (["--methods="], "methods", ()),
        (["--widths=300,100"], "widths", (300, 100)),
        (["--modes=consolidated,trained"], "modes", ("consolidated", "trained")),
        (["--preset=fast_slow"], "preset", "fast_slow"),
        (["--progress"], "progress", True),
        (["--noprogress"], "progress", False),
        (["--progress=false"], "progress", False),
        (["--workdir=runs/a b"], "workdir", "runs/a b"),
        (["--steps", "30"], "steps", 30),
        (["--steps=30", "--steps=40"], "steps", 40),
    ],
)
def test_a_flag_sets_its_field_alone(words, field, value):
    changed = parse(*words)
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    others = {name for name in vars(changed) if name != field}
    assert all(getattr(changed, name) == getattr(Config(), name) for name in others)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope=3"], "unknown flag --nope"),
        (["--sparsiti=3"], "unknown flag --sparsiti; did you mean --sparsity?"),
        (["--see=3"], "unknown flag --see; did you mean --seed?"),
        (["--seed=x"], "argument --seed: invalid int value: 'x'"),
        (["--seed"], "argument --seed: expected one argument"),
        (["--widths=3,x"], "--widths: invalid comma-separated int value: '3,x'"),
        (["--modes=fast"], "invalid choice: 'fast' (choose from trained, consolidated"),
        (["--preset=fast"], "argument --preset: invalid choice: 'fast'"),
        (["--progress=maybe"], "Boolean value expected"),
        (["sparsity=0.5"], "unexpected 'sparsity=0.5': flags are written --name=value"),
        (["--verbosity=loud"], "--verbosity=loud"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message in err
    assert "--help lists every flag" in err


def test_help_explains_every_flag_from_the_comments(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for sentence in [
        "A question about almost nothing. It stands for a real experiment",
        "fraction of zeros, in [0, 1); 0.9 leaves 10% of the weights (default: 0.9)",
        "--methods str,... compared methods (default: dense,rigl)",
        "--modes {trained,consolidated},... slow networks (default: trained)",
        "--preset {symmetric,fast_slow} how the two differ (default: symmetric)",
        "where to write; without it nothing is kept (default: None)",
    ]:
        assert sentence in text


@pytest.mark.parametrize("name", ["demo_experiment", *EXPERIMENTS])
def test_every_flag_of_every_experiment_is_explained(name):
    config_type = importlib.import_module(name).Config
    for field in dataclasses.fields(config_type):
        comment = get_attribute_docstring(config_type, field.name).help_string
        assert comment, f"{field.name} needs a comment on its line or above it"


def test_two_experiments_with_the_same_flag_live_side_by_side():
    other = type("other", (Config,), {"__module__": Config.__module__})
    assert cli.parse_flags(other, ["demo", "--seed=1"]).seed == 1
    assert parse("--seed=2").seed == 2
    assert "seed" not in flags.FLAGS


@pytest.mark.usefixtures("without_cache")
def test_refused_input_is_an_error_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_or_exit(demo_experiment.run, Config(sparsity=1.5))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err == "error: sparsity must be in [0, 1), got 1.5; try 0.9\n"


@pytest.mark.usefixtures("without_cache")
def test_an_interrupt_has_status_130(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_or_exit(demo_experiment.run, Config(steps=0))
    assert stopped.value.code == 130
    told = capsys.readouterr().err
    assert told.startswith("stopped by SIGINT; to go on where it stopped, run the")


@pytest.mark.usefixtures("without_cache")
def test_a_defect_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_or_exit(lambda config: 1 / 0, Config())


def test_compiled_programs_go_to_the_users_cache_directory(cache_home):
    cli.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(cache_home / "d2sparse" / "jax")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_cache_directory_of_the_environment_is_respected(cache_home, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache_home / "mine"))
    cli.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert list(cache_home.iterdir()) == []


def test_a_cache_home_that_is_no_absolute_path_is_ignored(cache_home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "gs://bucket")
    monkeypatch.setenv("HOME", str(cache_home))
    monkeypatch.chdir(cache_home)
    cli.use_compilation_cache()
    expected = str(cache_home / ".cache" / "d2sparse" / "jax")
    assert jax.config.jax_compilation_cache_dir == expected
    assert [path.name for path in cache_home.iterdir()] == [".cache"]


@pytest.mark.usefixtures("without_cache")
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *(("prune", flag) for flag in ("workdir", "data_dir", "ticket")),
        ("low_data", "tuned"),
        ("benchmark", "out"),
    ],
)
def test_an_address_is_refused_before_the_experiment_begins(name, flag, capsys):
    module = importlib.import_module(f"experiments.{name}")
    config = module.Config(**{flag: "gs://bucket/run"})
    with pytest.raises(SystemExit) as stopped:
        cli.run_or_exit(lambda config: pytest.fail("it has begun"), config)
    assert stopped.value.code == 2
    assert f"expected --{flag} on a local or mounted file" in capsys.readouterr().err


def test_without_a_cache_directory_nothing_is_cached(cache_home):
    before = jax.config.jax_compilation_cache_dir
    (cache_home / "d2sparse").write_text("a file where the directory should be")
    cli.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_the_command_runs_and_caches(tmp_path):
    done = command("--methods=set,rigl", XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "methods=('set', 'rigl')" in done.stdout
    assert (tmp_path / "d2sparse" / "jax").is_dir()


def test_the_command_fails_without_a_traceback():
    done = command("--steps=0", JAX_COMPILATION_CACHE_DIR="")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", STOPPED)


@pytest.mark.usefixtures("without_cache")
def test_the_traceback_is_there_for_those_who_ask(caplog):
    config = parse("--sparsity=2", "--verbosity=1")
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run_or_exit(demo_experiment.run, config)
    finally:
        parse("--verbosity=-1")
    assert stopped.value.code == 2
    assert "Traceback" in caplog.text
    assert "got 2.0; try 0.9" in caplog.text
