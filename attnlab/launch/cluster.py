"""Start-up of the processes that train together: finds them, connects them, says clearly why not."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from attnlab import config as config_lib
from attnlab.errors import UserError
from attnlab.train import processes
from attnlab.train.config import ClusterConfig

log = logging.getLogger(__name__)


def start(spec: str, overrides: Sequence[str]) -> None:
    """Connects this process to the others of its run, if there are others; before anything touches a device.

    Args:
      spec, overrides: of the run's config; its `cluster` alone is read.

    Raises:
      UserError: the others did not come in time, or the coordinator's address cannot be used.
    """
    _connect(config_lib.apply_overrides(config_lib.read_file(spec), list(overrides)))


def connect(overrides: Sequence[str]) -> None:
    """As `start`, of what has no file of a config."""
    _connect(config_lib.apply_overrides({}, list(overrides)))


def _connect(tree: dict[str, Any]) -> None:
    config = config_lib.build(ClusterConfig, tree.get("cluster", {}), "cluster")
    arguments = _arguments(config)
    if arguments is None:
        return
    if config.index:
        _reach(config)
    elif config.index == 0:
        log.info(
            "waiting up to %d s for %d processes at %s", config.start_timeout, config.processes, config.coordinator
        )
    import jax

    # It would take SIGTERM from the start on, and heed it only where a checkpoint is due.
    jax.config.update("jax_enable_preemption_service", False)
    # What jax throws out of a thread of its own, where some do not come, ends the process.
    processes.tell_at_abort(
        f"not all processes of this run were there in {config.start_timeout} s (cluster.start_timeout); "
        "those that are missing say why in their own logs"
    )
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=config.start_timeout,
            # The watch of attnlab.train.processes comes first: it says which process is gone.
            heartbeat_timeout_seconds=4 * config.timeout,
            shutdown_timeout_seconds=config.timeout,
        )
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"the processes of this run could not be connected in {config.start_timeout} s: {lines[0][:300]}\n"
            "look at --config.cluster.coordinator (an address that every host reaches), .processes and .index, "
            "or set --config.cluster.find=none for one process alone"
        ) from None
    global _connected
    _connected = True
    processes.tell_at_abort("jax ended this process (see above)")


_connected = False


def leave(code: int) -> None:
    """Ends this process with an exit code, if it is one of several: jax would wait at its exit for the others, which
    are gone or about to go, and then end it by abort."""
    if _connected:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reach(config: ClusterConfig) -> None:
    """Raises UserError unless process 0 listens in time; jax, which waits next, would end the process with a stack."""
    host, _, port = config.coordinator.rpartition(":")
    end = time.monotonic() + config.start_timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise UserError(
                f"process 0 did not answer at cluster.coordinator = {config.coordinator} "
                f"in {config.start_timeout} s ({reason}); "
                "is it running, and is this an address that every host reaches?"
            )
        time.sleep(0.5)


def _arguments(config: ClusterConfig) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with; None: there is one process."""
    if config.coordinator is not None:
        if config.processes == 1:
            return None
        return {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.index,
            "cluster_detection_method": "deactivate",
        }
    if config.find == "none" or not _in_cluster(os.environ):
        return None
    return {}


def _in_cluster(environment: Any) -> bool:
    """Whether the surroundings are those of several processes; jax then finds the rest itself."""
    several = lambda name: environment.get(name, "1").isdecimal() and int(environment.get(name, "1")) > 1
    if several("SLURM_STEP_NUM_TASKS") or several("OMPI_COMM_WORLD_SIZE"):
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and (
        "JOBSET_NAME" in environment or "JOB_COMPLETION_INDEX" in environment
    ):
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return True
    # A Cloud TPU machine outside Kubernetes tells its pod only through its metadata server, which jax asks.
    on_tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    return (
        on_tpu and importlib.util.find_spec("libtpu") is not None and environment.get("JAX_PLATFORMS", "tpu") == "tpu"
    )
