"""What every process of a run does in the tests: it reads its share, and trains.

    python tests/several.py DIRECTORY HOST:PORT,COUNT,INDEX

The directory holds the data set `toy`; the process leaves <index>.npz in it.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import SETTINGS, step_of

from d2sparse import train
from d2sparse.data import load, sources
from d2sparse.models import Model
from d2sparse.rules import rigl
from d2sparse.schedules import every
from d2sparse.study import processes
from d2sparse.train.loops import Stretch, take_steps
from d2sparse.transforms import get_masks, sparsify
from d2sparse.tree import flatten

STEPS, BATCH = 6, 8


def linear():
    def init(key, x):
        shape = (x[0].size, 3)
        return {"kernel": jax.random.normal(key, shape), "bias": jnp.zeros(3)}, {}

    def apply(params, model_state, x, *, train):
        logits = x.reshape(len(x), -1) @ params["kernel"]
        return logits + params["bias"].reshape(1, -1), model_state

    return Model(init, apply)


MODEL = linear()


def learn(directory, mesh=None):
    """The data set, and what a small network has learned of it."""
    source = load("toy", directory)
    data = train.to_device(source.train)
    tx = sparsify(optax.sgd(0.1), rigl(0.5), every(2))
    step = step_of(MODEL, data, tx)
    state = jax.jit(lambda key: train.init_state(MODEL, tx, data, key, SETTINGS))(
        jax.random.key(0)
    )
    run = train.make_runner(step, mesh)
    state = train.bring(take_steps(run, state, data, Stretch(STEPS, BATCH, every=2)))
    learned = {f"params/{k}": v for k, v in flatten(state.params).items()}
    masks = {f"masks/{k}": v for k, v in flatten(get_masks(state.opt_state)).items()}
    return {"images": source.train.images, "labels": source.train.labels} | {
        name: np.asarray(leaf) for name, leaf in (learned | masks).items()
    }


def counted(decode):
    """`decode`, and a list that grows by one at each call."""
    calls = []
    return lambda *given: (calls.append(1), decode(*given))[1], calls


def main(directory, distributed):
    jax.config.update("jax_disable_most_optimizations", True)
    with processes.joined(distributed):
        sources._decode, decoded = counted(sources._decode)
        mesh = train.make_mesh(jax.device_count())
        arrays = learn(directory, mesh) | {"decoded": len(decoded)}
        np.savez(Path(directory) / f"{jax.process_index()}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
