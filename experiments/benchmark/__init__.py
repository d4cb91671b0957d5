"""What does sparsity cost?

Times a refresh of the masks in passes over the weights and beside sorting them, the
optimiser step with and without `sparsify`, `fit` beside a loop written by hand, whole
training steps, compilation, many small runs at once, and steps that put a network on
another task; compares the estimate of memory with what is used; and holds the figures
against targets. All candidates of a table are timed in turns in one process. The whole
takes about ten minutes on two cores, where nothing has been compiled before.

    python -m experiments.benchmark --out=docs/benchmark.md
    python -m experiments.benchmark --quick --sections=refresh,step
    python -m experiments.benchmark --sections=memory

The last one, in a process of its own, shows on an accelerator what each training holds.
"""

import dataclasses
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from d2sparse import disk, distributions
from experiments.benchmark.memory import memory_table
from experiments.benchmark.prompting import prompts_table
from experiments.benchmark.refresh import refresh_table
from experiments.benchmark.small import small_table
from experiments.benchmark.steps import compile_table, step_table
from experiments.benchmark.tables import Table, to_markdown
from experiments.benchmark.targets import targets_table
from experiments.benchmark.training import seeds_table, training_table
from experiments.benchmark.workload import Sizes, machine, make_sizes, param_shapes

Section = Literal[
    "refresh", "step", "small", "training", "compile", "seeds", "memory", "prompts"
]
SECTIONS: Mapping[Section, Callable[[Sizes], Table]] = {
    "refresh": refresh_table,
    "step": step_table,
    "small": small_table,
    "training": training_table,
    "compile": compile_table,
    "seeds": seeds_table,
    "memory": memory_table,
    "prompts": prompts_table,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    sections: tuple[Section, ...] = tuple(SECTIONS)  # which tables are made
    # Networks whose parameters are pruned, in every section but "seeds"; the first is
    # trained as well. An accelerator has resnet50 in "prompts". If not given, resnet18
    # and resnet50, or resnet8 with --quick.
    models: tuple[str, ...] = ()
    # Small networks that are trained with many seeds. If not given, convnet_s, and on
    # an accelerator resnet8 and lenet_300_100.
    members: tuple[str, ...] = ()
    # Numbers of seeds of each small network that are trained in one program. If not
    # given, 1, 8 and 32, on an accelerator also 128, and 2 with --quick.
    seeds: tuple[int, ...] = ()
    sparsity: float = 0.8  # zeros among the prunable weights
    # Timings of every candidate, whose median is reported; 9 if not given, or 3 with
    # --quick. Candidates that take seconds get fewer.
    rounds: int | None = None
    quick: bool = False  # small sizes, to see that everything runs
    # A Markdown file for the tables, or a directory for a file benchmark.md. If not
    # given, they are only printed.
    out: str | None = None


def run(config: Config) -> dict[str, Table]:
    """Prints, writes and returns the tables by section, the targets last.

    Raises:
      ValueError: a flag is out of its range, a model is unknown, or the file cannot be
        written.
    """
    sizes = checked_sizes(config)
    path = out_path(config.out)
    text = [show(heading(config, sizes))]
    tables = {}
    for section, measure in SECTIONS.items():
        if section in config.sections:
            tables[section] = measure(sizes)
            text.append(show(to_markdown(tables[section])))
    tables["targets"] = targets_table(tables)
    text.append(show(to_markdown(tables["targets"])))
    if path is not None:
        path.write_text("\n".join(text), encoding="utf-8")
    return tables


def checked_sizes(config: Config) -> Sizes:
    """The sizes the flags ask for.

    Raises:
      ValueError: a flag is out of its range or a model is unknown.
    """
    unknown = sorted(set(config.sections) - set(SECTIONS))
    if unknown or not config.sections:
        raise ValueError(
            f"expected sections of {', '.join(SECTIONS)}, got "
            f"{', '.join(unknown) or 'none'}"
        )
    if config.rounds is not None and config.rounds < 1:
        raise ValueError(f"expected at least 1 round, got {config.rounds}")
    distributions.check_sparsity(config.sparsity)
    if min(config.seeds, default=1) < 1:
        raise ValueError(f"expected at least 1 seed, got seeds={config.seeds}")
    sizes = make_sizes(
        config.quick,
        config.sparsity,
        config.models,
        config.rounds,
        config.members,
        config.seeds,
    )
    for model, image in [*((m, sizes.image) for m in sizes.models), *sizes.members]:
        param_shapes(model, image)  # Refuses an unknown model.
    return sizes


def out_path(out: str | None) -> Path | None:
    """The file to write, its directory made; None for none.

    Raises:
      ValueError: it cannot be written.
    """
    if out is None:
        return None
    path = disk.local_path(out, "--out")
    path = path if path.suffix == ".md" else path / "benchmark.md"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(path.parent, os.W_OK | os.X_OK) else "not permitted"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem or path.is_dir():
        reason = problem or "it is a directory"
        raise ValueError(f"{path} cannot be written ({reason}); give another --out")
    return path


def heading(config: Config, sizes: Sizes) -> str:
    """Title, command, machine and settings."""
    return (
        f"# What sparsity costs\n\n    {command(config)}\n\nMeasured on {machine()}, "
        f"at sparsity {sizes.sparsity}; medians of {sizes.rounds} rounds, "
        f"{sizes.slow_rounds} of what takes seconds."
    )


def command(config: Config) -> str:
    """The words of a shell that run it.

    >>> command(Config(quick=True, sections=("step", "seeds")))
    'python -m experiments.benchmark --sections=step,seeds --quick'
    """
    words = ["python", "-m", "experiments.benchmark"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is True:
            words.append(f"--{field.name}")
        elif value != field.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"--{field.name}={text}")
    return shlex.join(words)


def show(text: str) -> str:
    """Prints a part of the report at once and returns it as it was printed."""
    print(text + "\n", flush=True)
    return text + "\n"
