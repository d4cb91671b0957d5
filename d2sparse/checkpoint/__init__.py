"""Checkpoints: whole runs to resume, and sparse parameters without their zeros.

Written and read by Orbax, whole or not at all: a directory appears under its name when
everything is in it. Its files are checked before they are opened; none is unpickled.
"""

from d2sparse.checkpoint.checkpoints import Checkpoint, Checkpoints
from d2sparse.checkpoint.sparse import load_sparse, save_sparse

__all__ = ["Checkpoint", "Checkpoints", "load_sparse", "save_sparse"]
