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


def read_what_is_asked() -> None:
    """Has Pallas's interpreter slice as a kernel says, where the place is a constant, and take no place for one from an
    array's end: two thirds of the operations of an interpreted kernel are these, over and over, and no kernel has any.
    Versions of jax that do it otherwise are left alone."""
    import numpy as np
    from jax._src.lax import slicing
    from jax._src.pallas import hlo_interpreter
    from jax._src.state import discharge, indexing

    places = getattr(discharge, "_maybe_convert_to_dynamic_slice", None)
    known = [getattr(module, name, None) for module, name in ((discharge, "lax_slicing"), (hlo_interpreter, "slicing"))]
    if places is None or known != [slicing, slicing]:  # or it is so already
        return

    class Slices:
        """jax's slices, of places that are not negative."""

        def __getattr__(self, name):
            return getattr(slicing, name)

        def dynamic_slice(self, x, starts, slice_sizes):
            if all(isinstance(i, np.integer) and 0 <= i <= m - n for i, n, m in zip(starts, slice_sizes, x.shape)):
                return slicing.slice(x, starts, [int(i) + n for i, n in zip(starts, slice_sizes)])
            return slicing.dynamic_slice(x, starts, slice_sizes, allow_negative_indices=False)

        def dynamic_update_slice(self, x, update, starts):
            return slicing.dynamic_update_slice(x, update, starts, allow_negative_indices=False)

    @functools.wraps(places)
    def constant_places(indexer):
        if (found := places(indexer)) is None:
            return None
        given = [i.start if isinstance(i, indexing.Slice) else i for i in indexer.indices]
        return tuple(np.int32(i) if isinstance(i, int) else start for i, start in zip(given, found[0])), *found[1:]

    discharge._maybe_convert_to_dynamic_slice = constant_places
    discharge.lax_slicing = hlo_interpreter.slicing = Slices()
