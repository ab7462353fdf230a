"""What has jax lower and XLA compile fast: most of the suite's time goes into programs that run once."""

import functools
import importlib.metadata
import inspect
import os
import threading

UNOPTIMISED = " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
UNOPTIMISED += " --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it
    UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"


def environment() -> dict[str, str]:
    """For a process that trains: it compiles as the tests do, and shares what they compiled."""
    return {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + UNOPTIMISED}


def share_contexts(programs: int = 200) -> None:
    """Lowers so many programs of a thread in one of MLIR's contexts, of which each loads every dialect there is: a
    third of what a program of one operation costs. Versions of jax that do it otherwise are left alone."""
    from jax._src.interpreters import mlir

    begin = getattr(getattr(mlir, "ModuleContext", None), "__init__", None)
    if begin is None or "context" not in inspect.signature(begin).parameters or not hasattr(mlir, "make_ir_context"):
        return
    here = threading.local()

    def shared():
        if mlir.ir.Context.current is not None:  # lowered on the way, inside of another program
            return mlir.make_ir_context()
        here.left = getattr(here, "left", 0) - 1
        if here.left < 0:  # what a context has once seen it keeps
            here.context, here.left = mlir.make_ir_context(), programs - 1
        return here.context

    @functools.wraps(begin)
    def begun(self, *args, context=None, **kwargs):
        begin(self, *args, context=shared() if context is None else context, **kwargs)

    mlir.ModuleContext.__init__ = begun
