"""Checkpoints that are damaged and commands that cannot work, each tried once."""

import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from attempts import Moment, Scenario, attempt
from outcomes import checkpoints, differences, in_child
from torment import TINY

from d2sparse.checkpoint import store

_WORDS = [*TINY, "--seeds=1", "--methods=gradual", "--sparsity=0.9"]
PRUNE = Scenario("prune", "experiments.prune", _WORDS)
# At the third measurement two checkpoints are there.
_STOP = Moment("metrics.jsonl", 4, (signal.SIGTERM,))
# Bytes that a file may have: less than a checkpoint, and more, but less than a figure.
_CHECKPOINT, _FIGURE = 5_000, 20_000


class Trial(NamedTuple):
    """Something that is done to an interrupted run before it goes on.

    Attributes:
      name: in the report.
      harm: what is done to the run directory.
      words: further flags of the command.
      before: what is done to the process.
      resumes: whether the run is to come to the end of one that was left alone.
      mended: whether it is to do so at the next attempt, when the process is let alone.
    """

    name: str
    harm: Callable[[Path], None] = lambda workdir: None
    words: tuple[str, ...] = ()
    before: Callable[[], None] = lambda: None
    resumes: bool = True
    mended: bool = False


class Tried(NamedTuple):
    """What has come of a trial.

    Attributes:
      name: of the trial.
      said: the warning or the error.
      end: how the command has ended.
      good: whether that is as it has to be.
    """

    name: str
    said: str
    end: str
    good: bool


def try_all(directory: Path) -> list[Tried]:
    """Interrupts one run, and lets a copy of it go on after every harm."""
    directory.mkdir(parents=True)
    reference, stopped = directory / "reference", directory / "stopped"
    done = attempt(PRUNE, reference)
    assert done.status == 0, done.said
    done = attempt(PRUNE, stopped, _STOP)
    assert done.status == 128 + signal.SIGTERM, done.said
    assert len(_checkpoints(stopped)) == 2
    return [
        _try(trial, stopped, reference, directory / str(number))
        for number, trial in enumerate(TRIALS)
    ]


def _try(trial: Trial, stopped: Path, reference: Path, workdir: Path) -> Tried:
    shutil.copytree(stopped, workdir)
    trial.harm(workdir)
    scenario = PRUNE._replace(words=[*PRUNE.words, *trial.words])
    done = attempt(scenario, workdir, before=trial.before)
    said, good = _message(done.said, workdir), (done.status == 0) == trial.resumes
    if not (trial.resumes or trial.mended):
        good &= not (workdir / "summary.json").exists()
    end = f"status {done.status}"
    if trial.mended:
        done = attempt(PRUNE, workdir)
        end += f", and with room again status {done.status}"
    if trial.resumes or trial.mended:
        wrong = ["status"] if done.status else differences(workdir, reference)
        end += f" and a different end: {wrong}" if wrong else " and the same end"
        good &= not wrong
    return Tried(trial.name, said, end, good)


def _message(said: str, workdir: Path) -> str:
    """The error or else the warning among what was said, and not where the run is."""
    for mark in ("error: ", "UserWarning: "):
        for line in said.splitlines():
            if mark in line:
                text = line.partition(mark)[2]
                return text.replace(f"{workdir}/", "").replace(str(workdir), "RUN")
    return ""


def _checkpoints(workdir: Path) -> list[Path]:
    """Of the only unit."""
    return checkpoints(*workdir.glob("checkpoints/*"))


def _largest(checkpoint: Path) -> Path:
    arrays = checkpoint / store.ARRAYS
    files = [path for path in arrays.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _cut(checkpoint: Path) -> None:
    path = _largest(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(checkpoint: Path) -> None:
    path = _largest(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(checkpoint: Path) -> None:
    path = _largest(checkpoint)
    other = path.rename(checkpoint.parents[2] / "elsewhere")
    path.symlink_to(other)


def _empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _relabel(checkpoint: Path) -> bool:
    """As if another version of the code, with another layout, had written it."""
    arrays, notes = store.read(checkpoint)
    first = next(path for path in notes["leaves"] if "kernel" in path)
    notes["leaves"][first.replace("kernel", "weight")] = notes["leaves"].pop(first)
    store.write(checkpoint, arrays, notes)
    return True


def _newest(harm: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda workdir: (harm(_checkpoints(workdir)[-1]), None)[1]


def _all(harm: Callable[[Path], object]) -> Callable[[Path], None]:
    def harm_all(workdir: Path) -> None:
        for checkpoint in _checkpoints(workdir):
            harm(checkpoint)

    return harm_all


def _cut_line(workdir: Path) -> None:
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"unit": "half a li')


def _fill_disk(room: int) -> Callable[[], None]:
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return fill


TRIALS = (
    Trial("nothing"),
    Trial("newest checkpoint: a file cut in half", _newest(_cut)),
    Trial("newest checkpoint: one bit flipped", _newest(_flip)),
    Trial("newest checkpoint: a file missing", _newest(lambda p: _largest(p).unlink())),
    Trial("newest checkpoint: a link in place of a file", _newest(_link)),
    Trial("newest checkpoint: emptied", _newest(_empty)),
    Trial(
        "newest checkpoint: no manifest",
        _newest(lambda path: (path / store.MANIFEST).unlink()),
    ),
    Trial("all checkpoints: cut in half", _all(_cut), resumes=False),
    Trial(
        "newest checkpoint: another code layout",
        _newest(lambda path: in_child(_relabel, path)),
        resumes=False,
    ),
    Trial("metrics.jsonl: half a line at its end", _cut_line),
    Trial("another --learning_rate", words=("--learning_rate=0.2",), resumes=False),
    Trial(
        "config.json of another program",
        lambda workdir: (workdir / "config.json").write_text("[1]") and None,
        resumes=False,
    ),
    *(
        Trial(
            f"a disk full at a {name}",
            before=_fill_disk(room),
            resumes=False,
            mended=True,
        )
        for name, room in (("checkpoint", _CHECKPOINT), ("figure", _FIGURE))
    ),
    Trial("a flag that does not exist", words=("--sparsities=0.9",), resumes=False),
)
