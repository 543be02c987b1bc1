"""Several processes of one run: how they find each other, who writes, and how they stop together.

JAX's own distributed runtime does the work; this says when to start it and what to ask of it.
"""

import functools
import os
import sys
from typing import Any

import jax

from kernels_pallas import device
from sparse_pretrain.sharding import apply, mesh, peers, plans

# What tells a process that a launcher started several. Units: processes, where there is a number.
LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "JOB_COMPLETION_INDEX": "Kubernetes",
}
# What JAX needs to ask a launcher who else there is, beyond what this package installs.
NEEDS = {"Open MPI": "mpi4py", "Kubernetes": "'jax[k8s]'"}
HEARTBEAT = 25  # seconds without a sign of life after which the others are told
GONE = ("connection", "socket", "gloo", "heartbeat", "unavailable", "timed out", "deadline")
FAILED = 1  # the exit code of a process that ends so
_STOP = "sparse_pretrain/stop"


class PeerLost(RuntimeError):
    """Another process of the run is gone; the message is one line."""


def start(coordinator: str = "", processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes, those given or those that a launcher started; else does nothing.

    Errors: ValueError naming the options of which some are given and some not, or that are needed
    beside this launcher.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id + 1}
    if any(given.values()):
        missing = [name for name, value in given.items() if not value]
        if missing:
            raise ValueError(f"{missing[0]}: needed beside {', '.join(set(given) - set(missing))}")
        if not 0 <= process_id < processes:
            raise ValueError(f"--process-id: {process_id} is not below --processes {processes}")
        where: dict[str, Any] = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process_id,
        }
    elif _launched():
        where = {}
    else:
        return
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as e:
        by = "" if where else _launched()
        if by not in NEEDS or jax.distributed.is_initialized():
            raise
        reason = " ".join(str(e).split())[:160]
        raise ValueError(
            f"--coordinator: {by} started this process, and JAX cannot ask it who else there "
            f"is ({reason}); pip install {NEEDS[by]}, or give --coordinator, --processes, "
            "--process-id"
        ) from None
    jax.devices()  # so that the two numbers below are known to whoever asks
    me = f"process {jax.process_index()} of {jax.process_count()}"
    peers.when_lost(functools.partial(_ended, me))


def _ended(me: str) -> None:
    """Ends this process where it stands, in a collective that will never end or before one."""
    print(f"error: {_gone(me, 'as JAX says above')}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def _launched() -> str:
    """Who started several processes, this one among them; empty if nobody did."""
    for name, launcher in LAUNCHERS.items():
        value = os.environ.get(name, "")
        if value and (name == "JOB_COMPLETION_INDEX" or int(value) > 1):
            return launcher
    return ""


def simulate(devices: int) -> None:
    """That many CPU devices in this process, in place of the machine's own device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def lead() -> bool:
    """Whether this process writes the run's files and speaks to its user."""
    return jax.process_index() == 0


def place(
    plan: str, text: str, microbatches: int, exchange: str = "auto", context: str = "auto",
    pipeline: str = "auto",
) -> apply.Placed | None:  # fmt: skip
    """The plan on the devices of all processes, with what else is asked; None for one device.

    Errors: ValueError naming plan, mesh or exchange, and what would fit.
    """
    found = plans.find(plan)
    if not found.axes:
        if several():
            raise ValueError(
                f"config.plan: {plan} is for one device, and there are {jax.process_count()} "
                f"processes; plans for several are {', '.join(plans.PLANS[1:])}"
            )
        if text:
            raise ValueError(f"config.mesh: {text!r} is given and plan {plan} is for one device")
        return None
    try:
        laid = mesh.make(found, text)
        apply.exchange(exchange, device.platform())
    except ValueError as e:
        raise ValueError(f"config.{e}") from None
    asked = exchange, context, pipeline
    return apply.Placed(found, laid, microbatches, *asked) if laid.size > 1 else None


class Stop:
    """A wish to stop that all processes grant at the same step.

    A process may be two steps ahead of another: it reads a step's metrics when it has started the
    next. So a wish of step n is for step n + 3, and every process has heard of it by then.
    """

    AHEAD = 3

    def __init__(self, asked: list[int]):
        self._asked, self._said = asked, False

    def now(self, step: int) -> bool:
        """Whether to stop after this step."""
        if not several():
            return bool(self._asked)
        store = peers.store()
        if self._asked and not self._said:
            self._said = True
            try:
                store.key_value_set(_STOP, str(step + self.AHEAD))
            except jax.errors.JaxRuntimeError:  # another process was first
                pass
        try:
            return step >= int(store.key_value_try_get(_STOP))
        except jax.errors.JaxRuntimeError:  # nobody has asked
            return False


def lost(error: BaseException) -> PeerLost | None:
    """What to tell the user where the error comes from another process being gone."""
    if not (several() and isinstance(error, jax.errors.JaxRuntimeError)):
        return None
    text = " ".join(str(error).split())
    if not any(word in text.lower() for word in GONE):
        return None
    me = f"process {jax.process_index()} of {jax.process_count()}"
    return PeerLost(_gone(me, text[:160]))


def _gone(me: str, reason: str) -> str:
    return (
        f"{me}: another process of the run is gone ({reason}); the same command, on any number of "
        "devices that fit, continues from the last checkpoint"
    )
