"""What has XLA compile fast: most of the suite's time goes into programs that run once."""

import importlib.metadata
import os

UNOPTIMISED = " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it
    UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"


def environment() -> dict[str, str]:
    """For a process that trains: it compiles as the tests do, and shares what they compiled."""
    return {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + UNOPTIMISED}
