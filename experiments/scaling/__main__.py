"""The command `python -m experiments.scaling`, on fake CPU devices."""

import jax

from d2sparse.study import cli
from experiments import scaling

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(scaling.CHECKED_ON))
    cli.main(scaling.run, scaling.Config)
