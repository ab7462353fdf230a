"""The program of a run: mesh, model, optimizer, where every array lies, and the compiled steps, put together once.

Training, evaluation, generation, ahead-of-time compilation and benchmarks hold one. Seeds are arguments, so runs that
differ in their seed alone share a program and what was compiled for it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from attnlab import data as data_lib
from attnlab import models, ops
from attnlab.batch import Spec, require_match
from attnlab.errors import UserError
from attnlab.parallel import partition
from attnlab.train import executables, optimizers, sharding
from attnlab.train.config import RunConfig
from attnlab.train.state import Model, TrainState, first_state, init_state, state_shardings
from attnlab.train.step import make_eval_step, make_train_step
from attnlab.train.teaching import Teaching

_most = 4  # programs that are shared: each holds what was compiled for it
_LEVEL = "xla_backend_optimization_level"


class Program:
    """What runs of a config execute. Nothing is traced or compiled before it is used.

    Args:
      config: of a run; its seed, names and paths do not matter.
      devices: those to use; None: all that this program runs on.
      batches: whether batches of the config's shape will be run, which its mesh must then divide.
      teaching: of `train.distill`, where train steps will be run.

    Attributes:
      chosen: the implementation of each op in the train step, once that was traced; see `attnlab.ops.recording`.
    """

    once: dict[str, Any] | None = {_LEVEL: 1}  # what XLA is told of a program that runs once, on a CPU

    def __init__(
        self,
        config: RunConfig,
        devices: Sequence[Any] | None = None,
        *,
        batches: bool = True,
        teaching: Teaching | None = None,
    ):
        self.config, self._devices, self._batches, self.teaching = config, devices, batches, teaching
        self.chosen: dict[str, Any] = {}
        self._compiled_init: Any = None
        self._step: Any = None
        self._loading: dict[str, concurrent.futures.Future] = {}

    @classmethod
    def of(
        cls,
        config: RunConfig,
        devices: Sequence[Any] | None = None,
        *,
        batches: bool = True,
        teaching: Teaching | None = None,
    ) -> Program:
        """The program of a config, shared with the runs of this process that compute the same; see the class."""
        # Without the teacher's model there is no train step, and what says so names the teacher.
        taught = config.train.distill if teaching is None else teaching.key
        key = (_computed(config), None if devices is None else tuple(devices), batches, taught)
        if key not in _shared:
            _shared[key] = cls(config, devices, batches=batches, teaching=teaching)
        _shared.move_to_end(key)
        while len(_shared) > _most:
            _shared.popitem(last=False)
        return _shared[key]

    @staticmethod
    def share(count: int) -> None:
        """From now on the newest `count` programs are shared, if that is more: many kinds of runs take turns."""
        global _most
        _most = max(_most, count)

    @staticmethod
    def forget() -> None:
        """Drops the shared programs: their memory, and what was traced of code that has changed since."""
        _shared.clear()

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Of the devices; ConfigError if the config does not fit these."""
        c = self.config
        rows, length = (c.data.batch // c.train.accumulate, c.data.length) if self._batches else (0, 0)
        return sharding.make_mesh(c.mesh, rows, self._devices, length=length)

    @functools.cached_property
    def model(self) -> Model:
        """The model, taken apart."""
        return Model.of(self.config.model)

    @functools.cached_property
    def rate(self) -> optax.Schedule:
        """Learning rate by step."""
        return optimizers.schedule(self.config.optimizer, self.config.train.steps)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        return optimizers.build(self.config.optimizer, self.config.train.steps, self.model.usages)

    @functools.cached_property
    def params(self) -> Any:
        """ShapeDtypeStructs of the parameters, with their shardings."""
        shapes = self.model.pure_shapes
        return _placed(shapes, sharding.parameter_shardings(self.mesh, self.model.axes, shapes))

    @functools.cached_property
    def shardings(self) -> TrainState:
        """A NamedSharding for every array of the state."""
        return state_shardings(self.mesh, self.model, self.tx, bool(self.config.train.ema))

    @functools.cached_property
    def _traced_init(self) -> Callable[[int], TrainState]:
        """What `shapes` and `init` trace, once for both."""
        ema = bool(self.config.train.ema)
        return jax.jit(lambda seed: init_state(self.model, self.tx, seed, ema), inline=True)

    @functools.cached_property
    def shapes(self) -> TrainState:
        """ShapeDtypeStructs of the whole state, wherever it lies."""
        return jax.eval_shape(self._traced_init, 0)

    @functools.cached_property
    def state(self) -> TrainState:
        """ShapeDtypeStructs of the whole state, with their shardings."""
        return _placed(self.shapes, self.shardings)

    @property
    def teacher(self) -> tuple[Any, ...]:
        """What the train step takes after the batch: the shapes of the teacher's parameters, or nothing."""
        return () if self.teaching is None else (self.teaching.params(self.mesh),)

    @functools.cached_property
    def batch_spec(self) -> Spec:
        """What the model takes."""
        return self.model.objective.batch_spec(self.config.model, self.config.data.length)

    @functools.cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """ShapeDtypeStructs of a step's batch, as the data yields it, with their shardings."""
        placed = lambda name: sharding.batch_sharding(self.mesh, self.batch_spec[name].axes)
        one = lambda name, field: jax.ShapeDtypeStruct(
            (self.config.data.batch, *field.shape), field.dtype, sharding=placed(name)
        )
        return {name: one(name, field) for name, field in self.config.data.batch_spec().items()}

    @functools.cached_property
    def init(self) -> Callable[[int], TrainState]:
        """`init(seed)`: the state before the first step, jitted."""
        return jax.jit(lambda seed: self._traced_init(seed), out_shardings=self.shardings)

    @functools.cached_property
    def _executables(self) -> executables.Executables:
        taught = None if self.teaching is None else self.teaching.key
        text = repr((_computed(self.config), self._batches, taught, dict(self.mesh.shape)))
        return executables.Executables(text, self.mesh.devices.ravel())

    def load_soon(self, *names: str) -> None:
        """Begins to load what an earlier process compiled ("train_step", "init"), beside what goes on."""
        if self._step is None:
            pool = concurrent.futures.ThreadPoolExecutor(len(names))
            self._loading = {name: pool.submit(self._executables.load, name) for name in names}
            pool.shutdown(wait=False)

    def first_state(self, seed: int) -> TrainState:
        """`init(seed)`, compiled or loaded beside the train step that comes next: either keeps a core busy. On a CPU
        it is compiled at a low level, as it runs once, unless XLA_FLAGS say at which."""
        if self._compiled_init is None:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                kept = self._load("init")
                init = None if kept else pool.submit(self._compile_init, self.init.lower(seed))
                self.prepare()
                self._compiled_init = kept[0] if kept else init.result()
        return self._compiled_init(seed)

    def prepare(self) -> None:
        """Has the train step compiled, or loaded as an earlier process compiled it; `step` is then ready to run."""
        if self._step is not None:
            return
        if kept := self._load("train_step"):
            self._step, self.chosen = kept
            return
        with ops.recording() as chosen:
            compiled = self.train_step.lower(self.state, self.batch, *self.teacher).compile()
        self.chosen, self._step = chosen.table(), self.train_step
        self._executables.made("train_step", compiled, self.chosen)

    def keep(self) -> None:
        """Writes what was compiled here to where later processes look: `attnlab.train.executables`."""
        self._executables.keep()

    @property
    def step(self) -> Any:
        """`train_step`, as `prepare` found it."""
        return self.train_step if self._step is None else self._step

    def _load(self, name: str) -> tuple[Any, Any] | None:
        begun = self._loading.pop(name, None)
        return self._executables.load(name) if begun is None else begun.result()

    def _compile_init(self, lowered: Any) -> Any:
        told = _LEVEL in os.environ.get("XLA_FLAGS", "")  # by the user, for all programs
        compiled = lowered.compile(self.once if jax.default_backend() == "cpu" and not told else None)
        self._executables.made("init", compiled)
        return compiled

    def begin(self, params: Any, seed: int) -> TrainState:
        """The state before the first step of a run that starts from these parameters, a pure dict."""
        start = lambda params, seed: first_state(params, self.tx, seed, bool(self.config.train.ema))
        return jax.jit(start, out_shardings=self.shardings)(params, seed)

    @functools.cached_property
    def train_step(self) -> Any:
        """`train_step(state, batch) -> (state, metrics)`, jitted; the state given is donated.

        With a teacher its parameters come third. UserError if the config has one and this program was not told.
        """
        c = self.config
        if c.train.distill is not None and self.teaching is None:
            raise UserError(
                f"train.distill.teacher = {c.train.distill.teacher} is opened by `attnlab train` alone; "
                "allowed here: train.distill = none"
            )
        factors = optimizers.factors(c.optimizer, self.model.usages) if c.optimizer.rates else None
        step = make_train_step(self.model, self.tx, c.train, self.rate, self.mesh, factors, self.teaching)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    @functools.cached_property
    def eval_step(self) -> Any:
        """`eval_step(params, batch) -> sums`, jitted."""
        return jax.jit(make_eval_step(self.model, self.config.train, self.mesh))

    @property
    def rows_ways(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in sharding.BATCH_AXES)

    def put(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """A batch on the devices, from this process's rows of it (`rows`)."""
        return sharding.put_batch(batch, self.mesh, self.batch_spec)

    def rows(self, batch: int) -> list[int]:
        """Which of a batch's rows this process reads."""
        return sharding.rows_of_process(self.mesh, batch)

    def traced(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, traced for this mesh: which implementation runs, and where, depends on it."""
        return partition.traced(fn, self.mesh, sharding.ACTIVATION_RULES)

    def streamed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """As `traced`, where the positions of a sequence come one after another and so cannot be split."""
        rules = {axis: over for axis, over in sharding.ACTIVATION_RULES.items() if axis != "seq"}
        return partition.traced(fn, self.mesh if self.mesh.size > 1 else None, rules)


def open_data(config: RunConfig) -> data_lib.Data:
    """The data of a run, checked against the model.

    Raises:
      UserError: it cannot be opened, or does not fit the model.
    """
    data, objective = data_lib.open_data(config.data), models.of(config.model)
    taken = objective.batch_spec(config.model, config.data.length)
    require_match(taken, data.batch_spec(), f"model.name = {objective.name!r}", f"data.name = {data.name!r}")
    return data


_shared: collections.OrderedDict[Any, Program] = collections.OrderedDict()


def _computed(config: RunConfig) -> Any:
    """What a program depends on, hashable."""
    t, c = config.train, config.optimizer
    steps = t.steps
    if c.schedule == "constant":  # which is told of them by its warm-up alone
        steps = optimizers.warmup_steps(c.warmup, steps)
    train = (steps, t.accumulate, t.ema, *(getattr(t, name) for name in models.of(config.model).options))
    arrays = tuple(sorted(config.data.batch_spec().items()))
    return config.model, config.optimizer, config.mesh, train, config.data.batch, config.data.length, arrays


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
