"""Run directories: what an experiment was told, measured and found.

A run directory belongs to one configuration and holds

    config.json          the configuration
    lock                 locked by the process that writes; names the last one
    metrics.jsonl        one line per measurement, in the order of measuring
    tensorboard/<unit>   the same measurements for TensorBoard
    units/<unit>.json    the results of a finished unit: one method with one seed
    checkpoints/<unit>   where an unfinished one resumes, see `d2sparse.checkpoint`
    summary.json         the results of the whole run, next to tables and figures

The same command with the same directory resumes: finished units are read back, and an
unfinished one resumes from its last checkpoint, or starts afresh where it has none.
Files appear whole or not at all, and are checked before they are used.

In a run of several processes all of them make the same calls. The first one writes, and
all read what it has written: the directory is on a file system that they share.
"""

from d2sparse.records.files import complete_lines
from d2sparse.records.opening import identity, open_run
from d2sparse.records.reading import Unit, read_metrics
from d2sparse.records.run import Run
from d2sparse.records.tables import markdown_table

__all__ = [
    "Run",
    "Unit",
    "complete_lines",
    "identity",
    "markdown_table",
    "open_run",
    "read_metrics",
]
