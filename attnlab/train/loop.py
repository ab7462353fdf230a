"""The training loop: start or resume, step, log, evaluate, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab import memory, ops
from attnlab.errors import ConfigError, TrainingFailed
from attnlab.evaluate.generate import Sampling, generate
from attnlab.evaluate.perplexity import Evaluation, evaluate
from attnlab.models.cost import model_cost
from attnlab.parallel import partition
from attnlab.train import metadata, optimizers, sharding, workdir
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.config import RunConfig
from attnlab.train.hardware import peak_flops, require_memory
from attnlab.train.metrics import MetricLog, Progress, Report
from attnlab.train.processes import Processes
from attnlab.train.state import Model, init_state, state_shardings
from attnlab.train.step import make_eval_step, make_train_step


def train(config: RunConfig, path: pathlib.Path, console: rich.console.Console) -> None:
    """Trains in the workdir `path` from its newest checkpoint, or from the start, to `train.steps`.

    SIGTERM, SIGINT and SIGHUP save a checkpoint and return; of several processes, to any one of them.

    Raises:
      UserError: the config, the data or the workdir cannot be used; nothing was overwritten.
      TrainingFailed: gradients were not finite too many steps in a row, or the workdir vanished.
    """
    processes = Processes(config.cluster)
    try:
        with workdir.hold(path) if processes.first else contextlib.nullcontext() as held:
            processes.barrier()  # the first one has made the workdir, and none has written to it
            checkpoints = Checkpoints(path, config.train.keep, processes=processes)
            report = Report(console, path if processes.first else None)
            newest = checkpoints.newest_host(report.say)
            last, old = newest[0] if newest else 0, metadata.read_config(path)
            processes.barrier()
            if old is None and newest:  # config.json is lost; what was saved knows it, too
                old = newest[1].config
            if old is not None:
                metadata.check_same(path, old, config, saved=last > 0)
            if last < config.train.steps:
                _Run(config, path, report, processes, checkpoints, held).run()
            elif processes.first:
                report.print(f"the run in {path} is complete: step {last} of {config.train.steps}")
            processes.barrier()
    except BaseException as error:
        processes.failed(error)
        raise
    finally:
        processes.close()


def load_tokenizer(config: RunConfig) -> data_lib.Tokenizer:
    """The tokenizer of a run, checked against the model.

    Raises:
      UserError: the tokenizer cannot be loaded, or its vocabulary is larger than the model's.
    """
    tokenizer = data_lib.load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab:
        raise ConfigError(
            f"model.vocab = {config.model.vocab} is smaller than the vocabulary of data.tokenizer = "
            f"{config.data.tokenizer!r}; allowed: {tokenizer.vocab_size} or more"
        )
    return tokenizer


def micro_batches(config: RunConfig) -> data_lib.DataConfig:
    """The data config whose batches are micro-batches: what evaluation, like training, holds at a time."""
    return dataclasses.replace(config.data, batch=config.data.batch // config.train.accumulate)


class _StopSignals:
    """Remembers SIGTERM, SIGINT and SIGHUP; a second SIGTERM or SIGINT acts at once.

    A terminal that closes sends SIGHUP more than once. Where it is ignored (nohup) it stays so.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGHUP:
            signal.signal(number, self._old[number])


class _Run:
    """One process's part of a run. `__init__` makes everything that can fail early; `run` steps."""

    def __init__(
        self,
        config: RunConfig,
        path: pathlib.Path,
        report: Report,
        processes: Processes,
        checkpoints: Checkpoints,
        held: workdir.Held | None,
    ):
        self.config, self.path, self.processes, self.checkpoints, self.held = config, path, processes, checkpoints, held
        c = config
        self.tokenizer = load_tokenizer(c)
        self.mesh = sharding.make_mesh(c.mesh, c.data.batch // c.train.accumulate, length=c.data.length)
        self.model = Model.of(c.model)
        self.rate = optimizers.schedule(c.optimizer, c.train.steps)
        self.tx = optimizers.build(c.optimizer, c.train.steps, self.model.usages)
        self.shardings = state_shardings(self.mesh, self.model, self.tx)
        shapes = jax.eval_shape(lambda: init_state(self.model, self.tx, c.seed))
        size = memory.size(shapes)
        saved = len(checkpoints.steps())
        if processes.first:
            workdir.require_space(path, size * max(c.train.keep + 2 - saved, 1))
        require_memory(c, size)

        rows = lambda data: sharding.rows_of_process(self.mesh, data.batch)
        self.loader = data_lib.train_loader(c.data, self.tokenizer, seed=c.seed, rows=rows(c.data))
        self.heldout = None
        if c.train.eval_every:
            micro, count = micro_batches(c), c.train.eval_batches * c.train.accumulate or None
            self.heldout = data_lib.heldout_loader(micro, self.tokenizer, batches=count, rows=rows(micro))
        self._report, self._say = report, report.say
        self._say(data_lib.describe(self.loader.summary()))
        warmup = optimizers.warmup_steps(c.optimizer.warmup, c.train.steps)
        if c.optimizer.warmup >= 1 and warmup != c.optimizer.warmup:
            self._say(
                f"optimizer.warmup = {c.optimizer.warmup} is not below train.steps ({c.train.steps}): "
                f"the warm-up is {warmup} steps"
            )

        self.step, self.tokens, self.state = 0, 0, None
        like = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, self.shardings)
        processes.meet()
        restored = checkpoints.newest(self._say, lambda step: checkpoints.restore(step, like))
        if restored is not None:
            self.step, (self.state, host) = restored
            self.tokens = host.tokens
            self.loader.set_state(host.data)
            self._say(f"resuming {path} at step {self.step}")
        else:
            init = jax.jit(lambda: init_state(self.model, self.tx, c.seed), out_shardings=self.shardings)
            self.state = init()

        self._tracing = False
        self._implementations: dict[str, dict[str, str]] = {}
        self._train_step = jax.jit(
            make_train_step(self.model, self.tx, c.train, self.rate, self.mesh),
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )
        # Simulated devices share one pool of threads: collectives of two programs, or a program that waits for a save
        # to let go of its arrays, can keep each other from running until XLA gives up.
        self._serial = jax.default_backend() == "cpu" and self.mesh.size > 1
        self._eval_step = jax.jit(make_eval_step(self.model, c.train, self.mesh))
        with partition.use(self.mesh, sharding.ACTIVATION_RULES):  # which implementation runs depends on where
            cost = model_cost(c.model, c.data.length)
        self._flops_per_token = 3 * cost.total_flops
        self._peak = peak_flops(self.mesh.size)
        self._describe()
        self._say(
            f"{cost.parameters:,} parameters, {self._flops_per_token / 1e6:,.1f} MFLOPs per token, "
            f"{self.mesh.size} of {jax.device_count()} x {jax.devices()[0].device_kind}, "
            f"{c.data.batch} x {c.data.length} tokens a step; everything goes to {path}"
        )

    def run(self) -> None:
        """Steps to the end, or to a signal."""
        c = self.config.train
        self.log = MetricLog(self.path, self.step, self._say) if self.processes.first else None
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            if self.log is not None:
                stack.callback(self.log.close)
            stack.callback(self.loader.close)
            stack.callback(self._stop_profile)
            self.progress = stack.enter_context(Progress(self._report, c.steps, self.step))
            signals = stack.enter_context(_StopSignals())
            self._clock = time.perf_counter()
            self._clock_step = self.step
            pending: tuple[int, Any] | None = None
            first = self.step + 1
            for step in range(first, c.steps + 1):
                self.processes.at_step(step)
                with self._profiled(step):
                    batch = sharding.put_batch(next(self.loader), self.mesh)
                    with ops.recording() as chosen:  # in what is traced: the first step
                        self.state, metrics = self._train_step(self.state, batch)
                    self._implementations = self._implementations or chosen.table()
                    if self._serial:
                        jax.block_until_ready(self.state)
                    # The metrics of a step are fetched while the next one runs: the host never makes the device wait.
                    if pending is not None:
                        self._finish(*pending)
                    pending = (step, metrics)
                self.checkpoints.poll()
                if step == first:
                    self._first_step_done(step, metrics)
                evaluating = self.heldout is not None and (step % c.eval_every == 0 or step == c.steps)
                # Asked once: what comes later acts at the next step.
                stopping = self.processes.agree_to_stop(step, signals.name)
                saving = step == c.steps or (c.save_every and step % c.save_every == 0) or stopping is not None
                if evaluating or saving:
                    evaluation = self._finish(*pending, evaluating=evaluating)
                    pending = None
                    if saving:
                        self._save(step, evaluation)
                    self._clock, self._clock_step = time.perf_counter(), step
                if stopping is not None and step < c.steps:
                    self.checkpoints.wait()
                    self._require_workdir()
                    self._say(f"{stopping}: saved step {step}; resume with the same command (--workdir {self.path})")
                    return
            self.checkpoints.wait()
            self._require_workdir()
            self._write_samples()
            self._say(f"done: step {c.steps}, {self.tokens:,} tokens; checkpoints and metrics are in {self.path}")

    def _first_step_done(self, step: int, metrics: Any) -> None:
        """After the first step everything is traced: what was chosen is known, and the clocks can start."""
        jax.block_until_ready(metrics)
        self._describe()
        self.progress.started(step)
        self._clock, self._clock_step = time.perf_counter(), step

    def _describe(self) -> None:
        if not self.processes.first:
            return
        more = {"data": self.loader.summary(), "mesh": dict(self.mesh.shape), "resumed_at": self.step}
        more |= {"implementations": self._implementations}
        metadata.write_json(self.path / "config.json", metadata.describe_run(self.config, **more))

    def _finish(self, step: int, metrics: Any, evaluating: bool = False) -> Evaluation | None:
        """Fetches the metrics of a step, checks them, logs them; evaluates if asked."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        tokens = int(values.pop("step_tokens"))
        self.tokens += tokens
        c = self.config.train
        if values["nonfinite"] >= c.max_nonfinite:
            raise TrainingFailed(
                f"step {step}: gradients were not finite for {int(values['nonfinite'])} steps in a row; "
                f"none of these changed a parameter\nlower optimizer.learning_rate or set optimizer.clip; "
                f"the newest checkpoint is step {max(self.checkpoints.steps(), default=0)}"
            )
        if not (step % c.log_every == 0 or step in (1, c.steps) or evaluating):
            return None
        self._require_workdir()
        now = time.perf_counter()
        seconds = (now - self._clock) / max(step - self._clock_step, 1)
        timed = step > self._clock_step
        self._clock, self._clock_step = now, step
        rate = tokens / seconds if timed else None
        record = {
            "step": step,
            "loss": values.pop("loss"),
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "step_seconds": seconds if timed else None,
            "mfu": rate * self._flops_per_token / self._peak if rate and self._peak else None,
            **values,
        }
        evaluation = None
        if evaluating:
            eval_step = lambda batch: self._eval_step(self.state.params, batch)
            evaluation = evaluate(eval_step, self._heldout_batches(), self.heldout.bytes)
            record["heldout_loss"] = evaluation.loss
            record["heldout_bits_per_byte"] = evaluation.bits_per_byte
            self._say(
                f"step {step}: held-out loss {evaluation.loss:.4f}, "
                f"{evaluation.bits_per_byte:.4f} bits per byte on {evaluation.tokens:,} tokens"
            )
        if self.log is not None:
            self.log.write(record)
        self.progress.update(step, record)
        return evaluation

    def _require_workdir(self) -> None:
        if self.held is not None:
            self.held.require()

    def _heldout_batches(self) -> Iterator[Any]:
        assert self.heldout is not None
        for batch in self.heldout:
            self.processes.working()
            yield sharding.put_batch(batch, self.mesh)

    def _save(self, step: int, evaluation: Evaluation | None) -> None:
        loss = None if evaluation is None else evaluation.loss
        host = Host(self.tokens, self.loader.get_state(), config_lib.to_dict(self.config), loss)
        self.checkpoints.save(step, self.state, host)
        if self._serial:
            self.checkpoints.wait()

    def _write_samples(self) -> None:
        count = self.config.train.sample_tokens
        if not count or self.heldout is None:
            return
        # The same prompts in every process: they run one program, whose steps depend on them.
        micro = micro_batches(self.config)
        same = data_lib.heldout_loader(micro, self.tokenizer, batches=1, rows=range(min(2, micro.batch)))
        batch = next(iter(same))
        prompts = []
        for tokens, segments in list(zip(batch["tokens"], batch["segments"])):
            document = tokens[segments == 1]
            if len(document):
                prompts.append(document[: min(len(document), 64)])
        sampling = Sampling(
            count, temperature=0.8, top_p=0.95, seed=self.config.seed,
            stop=self.tokenizer.eod_id, vocab=self.tokenizer.vocab_size,
        )  # fmt: skip
        out = generate(self.model.merge, self.state.params, prompts, sampling)
        if not self.processes.first:
            return
        with (self.path / "samples.txt").open("a", encoding="utf-8") as file:
            for prompt, new in zip(prompts, out.tokens):
                text = f"=== step {self.config.train.steps} · prompt ===\n{self.tokenizer.decode(prompt)}\n"
                file.write(f"{text}=== continuation ===\n{self.tokenizer.decode(new)}\n\n")

    @contextlib.contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        """Starts the profile before its first step and ends it after its last is computed."""
        window = self.config.train.profile_steps
        if window and window[0] <= step <= window[1] and not self._tracing:  # also when resuming between the two
            jax.profiler.start_trace(str(self.path / "profile"))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._tracing and step == min(window[1], self.config.train.steps):
            jax.block_until_ready(self.state)
            self._stop_profile()

    def _stop_profile(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._say(f"wrote a profile to {self.path / 'profile'}")
