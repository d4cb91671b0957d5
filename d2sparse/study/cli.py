"""A command whose flags are the fields of a frozen dataclass.

Every experiment ends with the same two lines, and nothing else knows of flags:

    if __name__ == "__main__":
        cli.main(run, Config)
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import shlex
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax

from d2sparse import disk
from d2sparse.checks import optional
from d2sparse.study import processes

with optional(__name__):
    from absl import app, flags, logging
    from simple_parsing.docstring import get_attribute_docstring

ConfigT = TypeVar("ConfigT")
# Fields that name files and directories, of any experiment.
_PATHS = ("workdir", "data_dir", "ticket", "tuned", "out")


def main(run: Callable[[ConfigT], object], config_type: type[ConfigT]) -> None:
    """Runs an experiment as a command and exits with its status.

    The flags are the fields of `config_type`: numbers, strings, booleans (`--progress`,
    `--noprogress`), `Literal` choices, `X | None`, and tuples of any length
    (`--methods=dense,rigl`). Each is explained by the comment on its line or, if that
    needs more room, on the lines above. The flags of absl are understood too.

    The exit status is 0 when `run` returns, 2 for a bad flag and for a `ValueError` of
    `run`, which is how an experiment refuses its input (one line on stderr, and the
    traceback with `--verbosity=1`), 1 where the disk or every run has failed, and 130
    when interrupted. Compiled programs are
    kept between runs in the user's cache directory, see `use_compilation_cache`.

    Args:
      run: the experiment. It gets the configuration and knows nothing of flags.
      config_type: a frozen dataclass with a default for every field.
    """
    app.run(
        functools.partial(run_or_exit, run),
        flags_parser=functools.partial(parse_flags, config_type),
    )


def run_or_exit(run: Callable[[ConfigT], object], config: ConfigT) -> None:
    """Runs an experiment, turning refused input and Ctrl-C into an exit status.

    Args:
      run: the experiment.
      config: what it is called with.

    Raises:
      SystemExit: with status 2 for a `ValueError`, 1 for an `OSError` and for a
        `FloatingPointError`, 130 for an interrupt.
    """
    use_compilation_cache()
    # absl shows what libraries say in passing, such as which backends jax did not find.
    if not flags.FLAGS.is_parsed() or not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        _refuse_addresses(config)
        with processes.joined(getattr(config, "distributed", "")):
            run(config)
    except ValueError as error:
        logging.debug("The error below was raised here:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, FloatingPointError) as error:
        logging.debug("The error below was raised here:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print(
            f"stopped by {signal.Signals(number).name}; to go on where it stopped, run "
            f"the same command again:\n    {_own_command()}",
            file=sys.stderr,
        )
        sys.exit(128 + number)


def parse_flags(config_type: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Reads a configuration from the words of a command line.

    Args:
      config_type: a dataclass with a default for every field. Where it has a field
        "axes", a number with several values, such as --sparsity=0.8,0.9, becomes an
        axis of it.
      argv: the command line, the name of the program first.

    Returns:
      The configuration.

    Raises:
      SystemExit: with status 2 for an unknown flag, a value of the wrong type or out of
        its range, or a stray argument, and 0 after `--help`.
    """
    parser = _Parser(
        prog=f"python -m {_module_name(sys.modules[config_type.__module__])}",
        description=sys.modules[config_type.__module__].__doc__,
        epilog="--verbosity=1 adds the traceback to an error.",
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    flags_of = _add_flags(parser, config_type)
    namespace, rest = parser.parse_known_args(argv[1:])
    try:
        stray = flags.FLAGS([argv[0], *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, flags_of)
        hint = f"; did you mean --{close[0]}?" if close else ""
        parser.error(f"unknown flag --{error.flagname}{hint}")
    except flags.Error as error:
        parser.error(str(error))
    if stray:
        parser.error(f"unexpected {' '.join(stray)!r}: flags are written --name=value")
    try:
        config: ConfigT = _configured(config_type, vars(namespace))
    except ValueError as error:
        parser.error(str(error))
    return config


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in the user's cache directory.

    The place is `$XDG_CACHE_HOME/d2sparse/jax`, by default below `~/.cache`. The
    variable `JAX_COMPILATION_CACHE_DIR` names another one, or none where it is empty;
    jax reads it, also as an address such as gs://bucket.
    Without a writable cache directory programs are compiled anew.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard of this variable ignores what is not absolute; an address is not.
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    directory = home / "d2sparse" / "jax"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # Also the many that are compiled in a moment: together they take seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _refuse_addresses(config: object) -> None:
    """Raises where a path is an address, before data are loaded for it."""
    for name in _PATHS:
        if path := getattr(config, name, None):
            disk.local_path(path, f"--{name}")


def _own_command() -> str:
    module = sys.modules["__main__"]
    program = ["python", "-m", _module_name(module)]
    if not module.__spec__:
        program = ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


def _module_name(module: types.ModuleType) -> str:
    name = module.__spec__.name if module.__spec__ else module.__name__
    return name.removesuffix(".__main__")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says in one line what argparse would say below a screen of usage."""
        self.exit(2, f"error: {message} (--help lists every flag)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """The question as it is written; no line of usage, which would list every flag."""

    def add_usage(self, *args: Any, **kwargs: Any) -> None:
        """Leaves it out."""


class _Several(NamedTuple):
    """The values of a flag that is an axis."""

    values: tuple[Any, ...]


def _add_flags(parser: argparse.ArgumentParser, config_type: type) -> list[str]:
    """Adds the flags in groups, those of the experiment first; returns their names."""
    names: list[str] = []
    groups: dict[type, list[Any]] = {}
    hidden = {"axes", *getattr(config_type, "HIDDEN", ())}
    fields = dataclasses.fields(config_type)
    for field in [field for field in fields if field.name not in hidden]:
        owner = _owner(config_type, field.name)
        groups.setdefault(owner, []).append(field)
    several = _axes_of(config_type)
    bases = inspect.getmro(config_type)
    for owner in [cls for cls in (bases[0], *bases[:0:-1]) if cls in groups]:
        doc = (owner.__doc__ or "").partition("\n")[0].rstrip(".")
        group = parser.add_argument_group(doc.lower())
        for field in groups[owner]:
            name = field.name.rstrip("_")
            _add_flag(group, config_type, field, several.get(field.name))
            names.append(name)
    return names


def _axes_of(config_type: type) -> dict[str, tuple[Any, ...]]:
    """The flags that may have several values, with those of axes by default."""
    fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(config_type)}
    if "axes" not in fields:
        return {}
    possible = {name: () for name, field in fields.items() if field.compare}
    return {**possible, **_default_axes(fields)}


def _default_axes(fields: Mapping[str, Any]) -> Mapping[str, tuple[Any, ...]]:
    factory = fields["axes"].default_factory
    return {} if factory is dataclasses.MISSING else factory()


def _owner(config_type: type, name: str) -> type:
    """The class that a field was declared, or given another default, in."""
    return next(
        cls
        for cls in inspect.getmro(config_type)
        if name in inspect.get_annotations(cls)
    )


def _add_flag(
    group: Any,
    config_type: type,
    field: dataclasses.Field[Any],
    axis: tuple[Any, ...] | None,
) -> None:
    """Adds a flag; `axis` has its values by default where it may have several."""
    kind = typing.get_type_hints(config_type)[field.name]
    default: Any = field.default
    name = field.name.rstrip("_")
    options: dict[str, Any] = {"dest": field.name}
    if kind is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        group.add_argument(
            f"--no{name}", action="store_false", dest=field.name, help=argparse.SUPPRESS
        )
    elif typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        default = ",".join(map(str, default))
        options |= {"type": _separated(item), "metavar": f"{_type_name(item)},..."}
    elif choices := typing.get_args(kind) if _is_literal(kind) else ():
        shown = f"{{{','.join(choices)}}}"
        options |= {"type": _one_of(choices, axis is not None), "metavar": shown}
    else:
        plain = next(t for t in (*typing.get_args(kind), kind) if t is not type(None))
        number = axis is not None and plain in (int, float)
        default = ",".join(map(str, axis)) if axis else default
        options |= {
            "type": _number_or_several(plain) if number else plain,
            "metavar": plain.__name__.upper(),
        }
    text = get_attribute_docstring(config_type, field.name)
    comment = text.comment_inline or text.comment_above
    # argparse formats its help with the % operator.
    explained = f"{comment} (default: {default})".replace("%", "%%")
    group.add_argument(f"--{name}", help=explained, **options)


def _configured(config_type: Any, values: dict[str, Any]) -> Any:
    """The configuration of the flags that were given."""
    plain = {k: v for k, v in values.items() if not isinstance(v, _Several)}
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    if "axes" in fields:
        axes = _default_axes(fields)
        kept = {name: several for name, several in axes.items() if name not in values}
        given = {k: v.values for k, v in values.items() if isinstance(v, _Several)}
        plain["axes"] = {**kept, **given}
    return config_type(**plain)


def _one_of(choices: Sequence[str], several: bool) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        words = [word.strip() for word in text.split(",")] if several else [text]
        _refuse_unknown(words, choices)
        return _Several(tuple(words)) if len(words) > 1 else words[0]

    return parse


def _number_or_several(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        words = [word.strip() for word in text.split(",") if word.strip()]
        if len(words) > 1:
            return _Several(tuple(map(kind, words)))
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def _separated(item_type: Any) -> Callable[[str], tuple[Any, ...]]:
    choices = typing.get_args(item_type)

    def parse(text: str) -> tuple[Any, ...]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        _refuse_unknown(words, choices or words)
        return tuple(words if choices else map(item_type, words))

    parse.__name__ = f"comma-separated {_type_name(item_type)}"
    return parse


def _refuse_unknown(words: Sequence[str], choices: Sequence[str]) -> None:
    for word in words:
        if word not in choices:
            raise argparse.ArgumentTypeError(
                f"invalid choice: {word!r} (choose from {', '.join(choices)})"
            )


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False}
    if (value := (known | {"no": False}).get(text.lower())) is None:
        raise argparse.ArgumentTypeError(f"Boolean value expected, got {text!r}")
    return value


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


def _type_name(item_type: Any) -> str:
    choices = typing.get_args(item_type)
    if len(choices) > 12:
        return "NAME"  # The explanation says where they are listed.
    return f"{{{','.join(choices)}}}" if choices else item_type.__name__
