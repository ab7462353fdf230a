"""The training loop: start or resume, step, log, evaluate, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console

from attnlab import config as config_lib
from attnlab import memory, models, ops, paths, storage
from attnlab.errors import TrainingFailed
from attnlab.evaluate import samples
from attnlab.evaluate.heldout import evaluate
from attnlab.models.cost import model_cost
from attnlab.train import beginning, distill, goodput, metadata, optimizers, trackers, workdir
from attnlab.train import source as source_lib
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.config import RunConfig
from attnlab.train.hardware import PeakBytes, peak_flops, require_memory
from attnlab.train.local_checkpoints import LocalCheckpoints, newest_of_both
from attnlab.train.metrics import MetricLog, Progress, Report
from attnlab.train.pieces import Layout
from attnlab.train.processes import Processes
from attnlab.train.program import Program, open_data
from attnlab.train.state import TrainState
from attnlab.train.stop_signals import StopSignals
from attnlab.train.stragglers import Stragglers


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call of `train` came to.

    Attributes:
      step: the last step done, and saved.
      tokens: trained on so far.
      stopped: the signal that stopped it before its last step; None: it is complete.
      metrics: what metrics.jsonl has of the last step that this call logged; empty where it did none.
      evaluation: the last one that this call made.
    """

    step: int
    tokens: int
    stopped: str | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: models.Figures | None = None


def train(
    config: RunConfig,
    path: pathlib.Path | storage.Url,
    console: rich.console.Console | None = None,
    *,
    began: float | None = None,
    init_from: pathlib.Path | storage.Url | source_lib.Pinned | None = None,
) -> Result:
    """Trains in the workdir `path` from its newest checkpoint, or from the start, to `train.steps`.

    SIGTERM, SIGINT and SIGHUP save a checkpoint and return; of several processes, to any one of them. Only the main
    thread hears them.

    Args:
      config: of the run. Runs of one process that differ in their seed alone compile once.
      path: the workdir.
      console: where it is told what happens; None: nowhere but in the workdir's log.txt.
      began: from when on the run's time counts (`attnlab.train.goodput`), in seconds since 1970; None: now.
      init_from: workdir of another run, whose newest checkpoint's (or the pinned one's) parameters are this one's first
        ones; all else begins anew. A run that has a checkpoint goes on from that.

    Raises:
      UserError: the config, the data or the workdir cannot be used; nothing was overwritten.
      TrainingFailed: gradients were not finite too many steps in a row, or the workdir vanished.
    """
    console = rich.console.Console(quiet=True) if console is None else console
    began = time.time() if began is None else began
    processes = Processes(config.cluster)
    try:
        with contextlib.ExitStack() as stack:
            tell, first = processes.gather, processes.first
            path = stack.enter_context(storage.opened(path, writes=True, first=first, tell=tell))
            held = stack.enter_context(workdir.hold(path)) if first else None
            processes.barrier()  # the first one has made the workdir, and none has written to it
            checkpoints = Checkpoints(path, config.train.keep, processes=processes)
            report = Report(console, path if processes.first else None)
            newest = checkpoints.newest_host(report.say, config.train.steps)
            last, old = newest[0] if newest else 0, metadata.read_config(path)
            beginning.require_same(path, init_from, saved=newest is not None)
            processes.barrier()
            if old is None and newest:  # config.json is lost; what was saved knows it, too
                old = newest[1].config
            if old is not None:
                metadata.check_same(path, old, config, saved=last > 0)
            if last < config.train.steps:
                clock = goodput.Clock(path if processes.first else None, began)
                source = teacher = None
                if init_from is not None and newest is None:
                    source = stack.enter_context(source_lib.opened(init_from, processes, report.say))
                if config.train.distill is not None:
                    before = newest[1].config if newest else None
                    teacher = stack.enter_context(distill.opened(config, path, processes, report.say, before=before))
                result = _Run(config, path, report, processes, checkpoints, held, clock, source, teacher).run()
            else:
                result = Result(last, newest[1].tokens)
                if processes.first:
                    report.print(f"the run in {path} is complete: step {last} of {config.train.steps}")
            processes.barrier()
            return result
    except BaseException as error:
        processes.failed(error)
        raise
    finally:
        processes.close()


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
        clock: goodput.Clock,
        source: source_lib.Source | None = None,
        teacher: distill.Teacher | None = None,
    ):
        self.config, self.path, self.processes, self.checkpoints, self.held = config, path, processes, checkpoints, held
        self._spent, self._stragglers = clock, Stragglers()
        processes.follow(lambda: clock.kind, clock.busy)
        trackers.require(config.train.trackers)
        self._report, self._say = report, report.say
        self._held_at_most = PeakBytes()
        c = config
        self.data = open_data(c)
        self.program = Program.of(c, teaching=None if teacher is None else teacher.teaching)
        self.mesh = self.program.mesh
        self.program.load_soon("train_step", *(() if checkpoints.steps() else ("init",)))
        self._beginning = None if source is None else beginning.fit(source, self.program.model)
        self._teacher = teacher
        if teacher is not None:
            teacher.require_fit(c, self.program.model, self.data)
        size = memory.size(self.program.state)
        saved = len(checkpoints.steps())
        if processes.first:
            kept = 0 if storage.mirrored(path) else c.train.keep + 1 - saved  # in a bucket one at a time is staged
            workdir.require_space(path, size * max(kept + 1, 1))
        require_memory(c, memory.size(self.program.batch), size + memory.size(self.program.teacher))

        self.loader = self.data.training(seed=c.seed, rows=self.program.rows(c.data.batch))
        self.micro, self.heldout = self.data.resized(c.data.batch // c.train.accumulate), None
        if c.train.eval_every:
            count, rows = c.train.eval_batches * c.train.accumulate or None, self.program.rows(self.micro.config.batch)
            self.heldout = self.micro.heldout(batches=count, rows=rows)
        self._say(self.data.describe(self.loader.summary()))
        self._say_warmup()
        processes.meet()
        self.local: LocalCheckpoints | None = None
        if c.train.local_checkpoint_every:
            place = pathlib.Path(paths.expand(c.train.local_checkpoint_dir))
            self.local = LocalCheckpoints(place, path, Layout(self.mesh, self.program.state), processes)
        self._tracing = False
        self._record: dict[str, Any] = {}
        self._evaluation: models.Figures | None = None
        # Simulated devices share one pool of threads: collectives of two programs, or a program that waits for a save
        # to let go of its arrays, can keep each other from running until XLA gives up.
        self._serial = jax.default_backend() == "cpu" and self.mesh.size > 1
        cost = self.program.traced(model_cost)(c.model, c.data.length, c.data.batch // c.train.accumulate)
        self._flops_per_token = 3 * cost.total_flops
        self._peak = peak_flops(self.mesh.size) if teacher is None else None  # whose work is not counted
        self._say(
            f"{cost.parameters:,} parameters, {self._flops_per_token / 1e6:,.1f} MFLOPs per token, "
            f"{self.mesh.size} of {jax.device_count()} x {jax.devices()[0].device_kind}, "
            f"{c.data.batch} x {c.data.length} tokens a step; everything goes to {path}"
        )
        self._taught: tuple[Any, ...] = ()
        if teacher is not None:
            self._say(teacher.line())
            with self._spent.during("restore"):
                self._taught = (teacher.params(self.mesh),)
        self.step, self.tokens, self.state = self._start()
        self.program.prepare()
        self._write_teacher()
        self._describe()

    def _write_teacher(self) -> None:
        if self._teacher is not None and self.processes.first:
            distill.write(self.path, self._teacher)

    def _say_warmup(self) -> None:
        given, steps = self.config.optimizer.warmup, self.config.train.steps
        warmup = optimizers.warmup_steps(given, steps)
        if given >= 1 and warmup != given:
            self._say(f"optimizer.warmup = {given} is not below train.steps ({steps}): the warm-up is {warmup} steps")

    def _start(self) -> tuple[int, int, TrainState]:
        """Step, tokens and state of the newest checkpoint, to whose place in the data the loader goes; or new ones."""
        with self._spent.during("restore"):
            restored = newest_of_both(self.checkpoints, self.local, self.program.state, self._say)
        if restored is None:
            return 0, 0, self._first()
        step, state, host = restored
        self.loader.set_state(host.data)
        self._say(f"resuming {self.path} at step {step}")
        return step, host.tokens, state

    def _first(self) -> TrainState:
        """The state before the first step. One that begins as another run's is saved, so that it is needed only now."""
        if self._beginning is None:
            if self._teacher is not None and (drawn := self._teacher.drawn()):
                self._say(drawn)
            return self.program.first_state(self.config.seed)
        for line in self._beginning.lines():
            self._say(line)
        with self._spent.during("restore"):
            params = self._beginning.params(self.program, self.config.seed, self._say)
            state = self.program.begin(params, self.config.seed)
        if self.processes.first:
            metadata.write_json(self.path / beginning.RECORD, self._beginning.record())
        self._write_teacher()  # no checkpoint is without it
        with self._spent.during("save"):
            self.checkpoints.save(0, state, Host(0, self.loader.get_state(), config_lib.to_dict(self.config)))
            self.checkpoints.wait()
        return state

    def run(self) -> Result:
        """Steps to the end, or to a signal."""
        c = self.config.train
        self.log = MetricLog(self.path, self.step, self._say) if self.processes.first else None
        names = c.trackers if self.processes.first else ()
        self.trackers = trackers.Trackers(names, self.path, config_lib.to_dict(self.config), self._say)
        with contextlib.ExitStack() as stack:
            stack.callback(self.trackers.close)
            stack.callback(self.checkpoints.close)
            if self.local is not None:
                stack.callback(self.local.close)
            self._spent.resumed(self.step)
            if self.log is not None:
                stack.callback(self.log.close)
            stack.callback(self.loader.close)
            stack.callback(self._stop_profile)
            self.progress = stack.enter_context(Progress(self._report, c.steps, self.step))
            signals = stack.enter_context(StopSignals())
            self._clock = time.perf_counter()
            self._clock_step = self.step
            pending: tuple[int, Any] | None = None
            first = self.step + 1
            self._spent.enter("step")
            for step in range(first, c.steps + 1):
                self.processes.at_step(step)
                with self._profiled(step):
                    with self._spent.during("data_wait"):
                        batch = next(self.loader)
                    batch = self.program.put(batch)
                    with ops.recording() as chosen, self._spent.on_device():  # recorded is what is traced: the first
                        self.state, metrics = self.program.step(self.state, batch, *self._taught)
                        if self._serial:
                            jax.block_until_ready(self.state)
                    self.program.chosen = self.program.chosen or chosen.table()
                    # The metrics of a step are fetched while the next one runs: the host never makes the device wait.
                    if pending is not None:
                        self._finish(*pending)
                    pending = (step, metrics)
                self.checkpoints.poll()
                if self.local is not None:
                    self.local.poll()
                if step == first:
                    self._first_step_done(step, metrics)
                evaluating = self.heldout is not None and (step % c.eval_every == 0 or step == c.steps)
                # Asked once: what comes later acts at the next step.
                stopping = self.processes.agree_to_stop(step, signals.name)
                saving = step == c.steps or (c.save_every and step % c.save_every == 0) or stopping is not None
                due = self.local is not None and (step % c.local_checkpoint_every == 0 or stopping is not None)
                local = due and step < c.steps
                if evaluating or saving or local:
                    evaluation = self._finish(*pending, evaluating=evaluating)
                    pending = None
                    self._save(step, evaluation, here=local, workdir=saving)
                    self._clock, self._clock_step = time.perf_counter(), step
                if stopping is not None and step < c.steps:
                    self._saved(step)
                    took = time.monotonic() - self.processes.heard
                    self._say(
                        f"{stopping}: saved step {step}; resume with the same command (workdir {self.path}); "
                        f"it was saved {took:.1f} s after the notice"
                    )
                    return self._result(step, stopped=stopping)
            self._saved(c.steps)
            if self.local is not None:
                self.local.remove()
            with self._spent.during("evaluation"):
                self._write_samples()
            self._spent.write(c.steps, now=True)
            self._say(f"done: step {c.steps}, {self.tokens:,} tokens; checkpoints and metrics are in {self.path}")
            return self._result(c.steps)

    def _saved(self, step: int) -> None:
        """Waits for what is being saved."""
        with self._spent.during("save"):
            if self.local is not None:
                self.local.wait()
            self.checkpoints.wait()
        self._require_workdir()
        self._spent.write(step, now=True)

    def _result(self, step: int, stopped: str | None = None) -> Result:
        return Result(step, self.tokens, stopped, self._record, self._evaluation)

    def _first_step_done(self, step: int, metrics: Any) -> None:
        """After the first step everything is traced: what was chosen is known, and the clocks can start."""
        with self._spent.on_device():
            jax.block_until_ready(metrics)
        self._spent.first_step_done(step)
        self.program.keep()
        self._describe()
        self.progress.started(step)
        self._clock, self._clock_step = time.perf_counter(), step

    def _describe(self) -> None:
        if not self.processes.first:
            return
        more = {"data": self.loader.summary(), "mesh": dict(self.mesh.shape), "resumed_at": self.step}
        more["implementations"] = self.program.chosen
        metadata.write_json(self.path / "config.json", metadata.describe_run(self.config, **more))

    def _finish(self, step: int, metrics: Any, evaluating: bool = False) -> models.Figures | None:
        """Fetches the metrics of a step, checks them, logs them; evaluates if asked."""
        with self._spent.on_device():
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
            "peak_bytes": self._held_at_most(),
            **values,
        }
        if step == 1:
            record |= self.data.references()
        evaluation = None
        if evaluating:
            eval_step = lambda batch: self.program.eval_step(self.state.params, batch)
            objective = self.program.model.objective
            with self._spent.during("evaluation"):
                evaluation = evaluate(objective, eval_step, self._heldout_batches(), self.heldout.facts())
            record |= evaluation.record()
            self._say(f"step {step}: {evaluation.line()}")
            self._evaluation = evaluation
        record["goodput"] = self._spent.share()
        spread = self._stragglers.spread(self.processes.lives())
        record |= spread.record() if spread else {}
        self._record = record
        if self.log is not None:
            self.log.write(record)
        self.trackers.log(step, record)
        self._spent.write(step)
        notes = distill.note(values), spread.note(record["step_seconds"]) if spread else ""
        self.progress.update(step, record, "  ".join(filter(None, notes)))
        return evaluation

    def _require_workdir(self) -> None:
        if self.held is not None:
            self.held.require()

    def _heldout_batches(self) -> Iterator[Any]:
        assert self.heldout is not None
        for batch in self.heldout:
            self.processes.working()
            yield self.program.put(batch)

    def _save(self, step: int, evaluation: models.Figures | None, *, here: bool, workdir: bool) -> None:
        """Saves on the hosts' own disks, in the workdir, or both."""
        loss = None if evaluation is None else evaluation.loss
        host = Host(self.tokens, self.loader.get_state(), config_lib.to_dict(self.config), loss)
        with self._spent.during("save"):
            if here:
                self.local.save(step, self.state, host)
            if workdir:
                self.checkpoints.save(step, self.state, host)
            if workdir and self._serial:
                self.checkpoints.wait()
        self._spent.write(step, now=True)

    def _write_samples(self) -> None:
        c = self.config
        if not c.train.sample_tokens or self.heldout is None or not self.program.model.objective.decodes:
            return
        model, streamed = self.program.model, self.program.streamed
        made = samples.continuations(
            model.merge, self.state.params, self.micro, c.train.sample_tokens, c.seed, streamed
        )
        if self.processes.first and made:
            with (self.path / "samples.txt").open("a", encoding="utf-8") as file:
                for prompt, text in made:
                    file.write(f"=== step {c.train.steps} · prompt ===\n{prompt}\n=== continuation ===\n{text}\n\n")

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
