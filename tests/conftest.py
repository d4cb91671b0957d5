"""Settings of every test: eight fake CPU devices, no silent broadcasting.

Programs are compiled without XLA's optimiser: most of a test's time is compiling, and
what is tested is what they compute.
"""

import gc
import os
import platform
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
}
# The older emitters of fusions compile in half the time of the new ones. Without AVX2
# they contract no product and sum into one operation: two programs give the same bits.
# A jaxlib that does not know a flag refuses it.
if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 10):
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
    FLAGS["--xla_cpu_parallel_codegen_split_count"] = "1"
    if platform.machine() in ("x86_64", "AMD64"):
        FLAGS["--xla_cpu_max_isa"] = "AVX"
given = os.environ.get("XLA_FLAGS", "")
missing = [f"{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing allocates millions of small objects that stay; looking through them after
# every 700, as Python does, takes a fifteenth of the time.
gc.set_threshold(50_000)
