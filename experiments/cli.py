"""A command whose flags are the fields of a frozen dataclass.

Every experiment ends with the same two lines, and nothing else knows of flags:

    if __name__ == "__main__":
        cli.main(run, Config)
"""

import contextlib
import difflib
import functools
import os
import shlex
import signal
import sys
import typing
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import simple_parsing
from absl import app, flags, logging
from simple_parsing.wrappers import DataclassWrapper, FieldWrapper

from d2sparse import disk
from experiments import processes

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
      config_type: a dataclass with a default for every field.
      argv: the command line, the name of the program first.

    Returns:
      The configuration.

    Raises:
      SystemExit: with status 2 for an unknown flag, a value of the wrong type or a
        stray argument, and 0 after `--help`.
    """
    module = sys.modules[config_type.__module__]
    parser = _Parser(
        prog=f"python -m {module.__spec__.name}" if module.__spec__ else None,
        description=module.__doc__,
        epilog="--verbosity=1 adds the traceback to an error.",
        allow_abbrev=False,
    )
    fields = parser.add_arguments(
        config_type, dest="config", dataclass_wrapper_class=_Flags
    ).fields
    for field in fields:
        _adapt(field)
    namespace, rest = parser.parse_known_args(argv[1:])
    try:
        stray = flags.FLAGS([argv[0], *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, [f.name for f in fields])
        hint = f"; did you mean --{close[0]}?" if close else ""
        parser.error(f"unknown flag --{error.flagname}{hint}")
    except flags.Error as error:
        parser.error(str(error))
    if stray:
        parser.error(f"unexpected {' '.join(stray)!r}: flags are written --name=value")
    return namespace.config


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


def _refuse_addresses(config: object) -> None:
    """Raises where a path is an address, before data are loaded for it."""
    for name in _PATHS:
        if path := getattr(config, name, None):
            disk.local_path(path, f"--{name}")


def _own_command() -> str:
    module = sys.modules["__main__"].__spec__
    name = module.name.removesuffix(".__main__") if module else ""
    program = ["python", "-m", name] if name else ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


class _Parser(simple_parsing.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says in one line what argparse would say below a screen of usage."""
        self.exit(2, f"error: {message} (--help lists every flag)\n")


class _Flags(DataclassWrapper):
    title = "flags"


def _adapt(field: FieldWrapper) -> None:
    """Lets comments contain per cent signs, and reads tuples as comma-separated."""
    if field.help:
        # argparse formats its help with the % operator.
        field.help = field.help.replace("%", "%%")
    if typing.get_origin(field.type) is tuple:
        item_type = typing.get_args(field.type)[0]
        field.arg_options.update(
            type=_comma_separated(item_type),
            default=",".join(map(str, field.default)),
            metavar=f"{_type_name(item_type)},...",
            nargs=None,
        )


def _comma_separated(item_type: Any) -> Callable[[str], tuple[Any, ...]]:
    choices = typing.get_args(item_type)

    def parse(text: str) -> tuple[Any, ...]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        for word in words:
            if choices and word not in choices:
                known = ", ".join(choices)
                raise ArgumentTypeError(
                    f"invalid choice: {word!r} (choose from {known})"
                )
        return tuple(words if choices else map(item_type, words))

    parse.__name__ = f"comma-separated {_type_name(item_type)}"
    return parse


def _type_name(item_type: Any) -> str:
    choices = typing.get_args(item_type)
    return f"{{{','.join(choices)}}}" if choices else item_type.__name__
