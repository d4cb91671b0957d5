"""Which of these methods trains the better network, alone or mixed with others?

Any rows of `d2sparse.constraints.METHODS`, each under further constraints by `--with`,
over seeds and over the values of any numeric flags. All methods of a seed see the same
labels, and differences to the first method are paired.

    python -m experiments.compare
    python -m experiments.compare --methods=rigl,imp --with=averaged
    python -m experiments.compare --methods=imp,soup,swamp --sparsity=0.9,0.98
    python -m experiments.compare --learning_rate=0.03,0.1 --dry_run
"""

import dataclasses

from d2sparse import study
from d2sparse.study import cli


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """What is compared."""

    # What to compare, all but the first with its difference to the first.
    methods: tuple[study.MethodName, ...] = ("dense", "rigl", "imp", "d2_sparse")


if __name__ == "__main__":
    cli.main(study.compare, Config)
