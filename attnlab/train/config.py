"""The config of a run: every key that can be set, its type and its checks."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab import models
from attnlab.models.distillation import Matching
from attnlab.ops.cross_entropy import CROSS_ENTROPY
from attnlab.ops.kl_divergence import KL_DIVERGENCE
from attnlab.train import optimizers, trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Matching):
    """A teacher, and what of it is matched.

    Attributes:
      teacher: workdir of its run, local or in a bucket; its model is as its config.json says.
      step: of its checkpoint; none: the newest when the run begins.
    """

    teacher: str
    step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(bool(self.teacher), "teacher", self.teacher, "the workdir of a run")
        config_lib.require(self.step is None or self.step >= 0, "step", self.step, "0 or more, or none")


def _distill(tree: Any, path: str) -> DistillConfig | None:
    text = tree.text if isinstance(tree, config_lib.Override) else tree
    if text is None or (isinstance(text, str) and text.lower() in ("none", "null")):
        return None
    return tree if isinstance(tree, DistillConfig) else config_lib.build(DistillConfig, tree, path)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how a run trains, and what it leaves.

    Attributes:
      steps: optimizer steps.
      accumulate: micro-batches that a step's `data.batch` sequences are processed in.
      ema: decay b of the averaged weights w <- w + (1 - min(b, (1 + t)/(10 + t))) (parameters - w) after every update,
        t the updates before it, w at first the first parameters; kept in fp32 beside them; none or 0: there are none.
      distill: a teacher that the run learns of: see `DistillConfig`; none: it learns of the data alone.
      z_loss: of language models: coefficient of the mean squared log-partition (Chowdhery et al. 2022, PaLM,
        section 5); 0: off.
      loss_chunk: of language models: columns of the vocabulary whose logits a product makes.
      loss_impl: of language models: how cross-entropy is computed: auto, definition, chunked or pallas.
      log_every: steps between logged lines.
      eval_every: steps between evaluations on held-out data, and one after the last step; 0: never.
      eval_batches: held-out batches of an evaluation; 0: all of them.
      save_every: steps between checkpoints, and one after the last step; 0: only that one.
      local_checkpoint_every: steps between checkpoints on the hosts' own disks, beside those of `save_every`; 0: none.
      local_checkpoint_dir: where on each host.
      keep: newest checkpoints that are kept; of those saved at an evaluation, the best by held-out loss is kept, too.
      sample_tokens: tokens of each sample that a language model writes to samples.txt after the last step; 0, or
        without evaluation: no samples.
      max_nonfinite: steps in a row with non-finite gradients after which the run stops; such a step updates nothing.
      trackers: of `attnlab.train.trackers`, told every logged step: wandb, mlflow, trackio.
      profile: FIRST:LAST, steps that a profile is written of; none: no profile.
      on_config_change: stop or continue, when the workdir holds a run of another config.
    """

    steps: int = 1000
    accumulate: int = 1
    ema: float | None = None
    distill: Any = config_lib.node(_distill, default=None)
    z_loss: float = 0.0
    loss_chunk: int = 8192
    loss_impl: str = "auto"
    log_every: int = 10
    eval_every: int = 250
    eval_batches: int = 16
    save_every: int = 250
    local_checkpoint_every: int = 0
    local_checkpoint_dir: str | None = None
    keep: int = 2
    sample_tokens: int = 256
    max_nonfinite: int = 10
    trackers: tuple[str, ...] = ()
    profile: str | None = None
    on_config_change: str = "stop"

    def __post_init__(self) -> None:
        for key, least in (
            ("steps", 1),
            ("accumulate", 1),
            ("loss_chunk", 1),
            ("log_every", 1),
            ("eval_every", 0),
            ("eval_batches", 0),
            ("save_every", 0),
            ("local_checkpoint_every", 0),
            ("keep", 1),
            ("sample_tokens", 0),
            ("max_nonfinite", 1),
        ):
            value = getattr(self, key)
            config_lib.require(value >= least, f"train.{key}", value, f"{least} or more")
        config_lib.require(
            not self.local_checkpoint_every or bool(self.local_checkpoint_dir),
            "train.local_checkpoint_dir",
            self.local_checkpoint_dir,
            f"a directory on each host where train.local_checkpoint_every = {self.local_checkpoint_every}",
        )
        config_lib.require(0 <= (self.ema or 0) < 1, "train.ema", self.ema, "0 (none) or more, below 1")
        config_lib.require(self.z_loss >= 0, "train.z_loss", self.z_loss, "0 or more")
        config_lib.require_choice("train.loss_impl", self.loss_impl, list(CROSS_ENTROPY.names()))
        config_lib.require_choice("train.on_config_change", self.on_config_change, ["stop", "continue"])
        for name in self.trackers:
            config_lib.require_choice("train.trackers", name, list(trackers.TRACKERS))
        if self.profile is not None:
            ok = (
                re.fullmatch(r"\d{1,10}:\d{1,10}", self.profile) and 1 <= self.profile_steps[0] <= self.profile_steps[1]
            )
            config_lib.require(bool(ok), "train.profile", self.profile, "FIRST:LAST, steps counted from 1, e.g. 10:15")
            first = self.profile_steps[0]
            config_lib.require(
                first <= self.steps, "train.profile", self.profile, f"a first step within train.steps ({self.steps})"
            )

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """First and last profiled step."""
        if self.profile is None:
            return None
        first, last = self.profile.split(":")
        return int(first), int(last)


MESH_AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; -1, for one of them: all devices that the others leave.

    Sizes that are all given and multiply to fewer devices than there are use the first ones.

    Attributes:
      data: copies of the model, each on its share of the batch.
      fsdp: shares of the batch over which parameters and optimizer state are split too.
      context: splits the positions of every sequence; parameters and optimizer state are split over it, too.
      tensor: splits heads, MLP and vocabulary.
      slices: the axis that goes over several slices, whose network (DCN) is slower than that within one.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slices: str = "data"

    def __post_init__(self) -> None:
        sizes = self.sizes()
        for key, value in sizes.items():
            config_lib.require(value >= 1 or value == -1, f"mesh.{key}", value, "1 or more, or -1 for the rest")
        free = [k for k, v in sizes.items() if v == -1]
        config_lib.require(len(free) <= 1, f"mesh.{free[-1] if free else ''}", -1, "-1 for one axis only")
        config_lib.require_choice("mesh.slices", self.slices, list(sizes))

    def sizes(self) -> dict[str, int]:
        """Axis to size, -1 for the rest; the outermost axis first."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """The processes that train together, one per host; without any of it they are found, or there is one.

    Attributes:
      coordinator: `host:port` of process 0, which listens there.
      processes: how many there are.
      index: which of them this one is, from 0.
      find: `auto` looks for a TPU pod, SLURM, Kubernetes or Open MPI where `coordinator` is not given; `none` does not.
      start_timeout: seconds in which all processes must have come.
      timeout: seconds without a sign of life of a process after which the others end.
      step_timeout: seconds without a step after which all end, the compilation of the first included; 0: never.
    """

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None
    find: str = "auto"
    start_timeout: int = 300
    timeout: int = 30
    step_timeout: int = 1800

    def __post_init__(self) -> None:
        need = config_lib.require
        config_lib.require_choice("cluster.find", self.find, ["auto", "none"])
        given = [k for k in ("coordinator", "processes", "index") if getattr(self, k) is not None]
        need(
            len(given) in (0, 3),
            "cluster",
            ", ".join(given),
            "coordinator, processes and index together, or none of them",
        )
        if self.coordinator is not None:
            found = re.fullmatch(r".+:(\d{1,5})", self.coordinator)
            good = found is not None and int(found[1]) < 2**16
            need(good, "cluster.coordinator", self.coordinator, "host:port, a port below 65536")
            need(self.processes >= 1, "cluster.processes", self.processes, "1 or more")
            need(0 <= self.index < self.processes, "cluster.index", self.index, f"0 to {self.processes - 1}")
        for key, least in (("start_timeout", 1), ("timeout", 5), ("step_timeout", 0)):
            need(getattr(self, key) >= least, f"cluster.{key}", getattr(self, key), f"{least} or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      seed: of parameters, data order and dropout.
      data, model, optimizer, train, mesh, cluster: see their classes.
    """

    data: Any = config_lib.node(data_lib.config_from_node)
    model: Any = config_lib.node(models.config_from_node)
    optimizer: Any = config_lib.node(optimizers.config_from_node)
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    cluster: ClusterConfig = ClusterConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        config_lib.require(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2^31 - 1")
        split = self.train.accumulate
        config_lib.require(
            self.data.batch % split == 0, "train.accumulate", split, f"divisors of data.batch ({self.data.batch})"
        )
        objective, source = models.of(self.model), f"data.name = {self.data.node_name!r}"
        spec = objective.batch_spec(self.model, self.data.length)
        batch_lib.require_match(spec, self.data.batch_spec(), f"model.name = {objective.name!r}", source)
        for name in _OPTIONS:
            value, default = getattr(self.train, name), getattr(TrainConfig, name)
            config_lib.require(
                value == default or name in objective.options,
                f"train.{name}",
                value,
                f"{default} where model.name = {objective.name!r}, whose loss has no such thing",
            )
        self._require_distillable(objective)
        self.model.require_split(self.mesh.context)
        self.model.require_length(self.data.length)
        if batch_lib.counts_every_next(self.data.batch_spec()):
            self.model.require_nothing_ahead()

    def _require_distillable(self, objective: type[models.Objective]) -> None:
        distill, train = self.train.distill, self.train
        if distill is None:
            return
        able = ", ".join(objective.distills) or f"none: model.name = {objective.name!r} has nothing to match"
        config_lib.require(distill.match in objective.distills, "train.distill.match", distill.match, able)
        config_lib.require(train.z_loss == 0, "train.z_loss", train.z_loss, "0 beside train.distill")
        if distill.match == "logits":
            able = f"{', '.join(KL_DIVERGENCE.names())} beside train.distill.match = 'logits'"
            config_lib.require(train.loss_impl in KL_DIVERGENCE.names(), "train.loss_impl", train.loss_impl, able)


# Fields of `train` that some models' losses read and others know nothing of.
_OPTIONS = ("z_loss", "loss_chunk", "loss_impl")

_FREE_KEYS = (
    "train.log_every",
    "train.save_every",
    "train.local_checkpoint_every",
    "train.local_checkpoint_dir",
    "train.keep",
    "train.profile",
    "train.max_nonfinite",
    "train.sample_tokens",
    "train.on_config_change",
    "train.trackers",
    "train.distill.teacher",  # what it is, its checkpoint's digest says
    *(f"cluster.{f.name}" for f in dataclasses.fields(ClusterConfig)),
)


def free_keys(config: RunConfig) -> tuple[str, ...]:
    """What may differ when a run goes on: it changes no number that the run computes."""
    return *_FREE_KEYS, *(f"data.{name}" for name in config.data.free)


def placement_keys(config: RunConfig) -> tuple[str, ...]:
    """Where and how a run is computed, which is for whoever has the devices to say; keys, and beginnings of keys."""
    return "mesh.", "train.loss_impl", *(f"model.{name}" for name in config.model.placement)


def load(spec: str, overrides: list[str]) -> RunConfig:
    """A run's config from `PATH[:arg=value,...]` and overrides `any.field=value`."""
    return config_lib.load(RunConfig, spec, overrides)
