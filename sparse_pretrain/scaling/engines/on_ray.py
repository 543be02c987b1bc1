"""Children on the machines of a Ray cluster, which share the sweep's folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain.scaling import engines, process
from sparse_pretrain.scaling.children import Child
from sparse_pretrain.scaling.engines import shared

OPTIONS = ("address", "cpus", "gpus", "tpus")
LOOPBACK = "127.0.0.1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home


def stay_on_loopback() -> None:
    """Keeps Ray, imported after this, from putting this machine's outward address for 127.0.0.1.

    It has one switch for that, named for the systems whose firewalls ask.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


class OnRay:
    """A Ray task a child, spread over the machines.

    Options: `address` of the cluster (default: $RAY_ADDRESS, else one of this machine alone, on the
    loopback address only), and `cpus`, `gpus` and `tpus` that a child takes (default: one core).
    Errors: ValueError naming an option that there is not, or when Ray is not installed or reached.
    """

    def __init__(
        self,
        *,
        workers: int,
        root: Path,
        options: Mapping[str, str] | None = None,
        prefix: Sequence[str] = process.PREFIX,
    ):
        options = options or {}
        engines.unknown_option("ray", options, OPTIONS)
        address = options.get("address") or os.environ.get("RAY_ADDRESS")
        if address is None or address.partition(":")[0] in (LOOPBACK, "localhost"):
            stay_on_loopback()
        self._ray = engines.needs("ray", "ray", "--engine=ray")
        self._prefix = tuple(prefix)
        wants: dict[str, Any] = {
            "num_cpus": shared.number("ray", options, "cpus", 1.0),
            "num_gpus": shared.number("ray", options, "gpus", 0.0),
        }
        if tpus := shared.number("ray", options, "tpus", 0.0):
            wants["resources"] = {"TPU": tpus}
        self._owner = not self._ray.is_initialized()
        if self._owner:
            self._connect(address, workers if wants["num_cpus"] <= 1 else None)
        # Retries are the driver's, which has the causes; a child may not hide behind another.
        remote = self._ray.remote(shared.execute)
        self._task = remote.options(max_retries=0, scheduling_strategy="SPREAD", **wants)

    def _connect(self, address: str | None, cpus: int | None) -> None:
        more: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is None:
            more |= {"_node_ip_address": LOOPBACK, "include_dashboard": False}
            more["num_cpus"] = max(cpus or 1, os.cpu_count() or 1)
        try:
            self._ray.init(address=address, **more)
        except (ConnectionError, RuntimeError, ValueError) as e:
            lines = str(e).strip().splitlines()
            raise ValueError(f"--option: address={address}: {lines[0] if lines else e}") from None

    def run(self, child: Child, asked: process.Asked) -> process.Outcome:
        """As a task; where its machine dies, it is lost."""
        shared.no_stop(child)
        task = self._task.remote(child, self._prefix)
        wish = 0
        while True:
            ready, _ = self._ray.wait([task], timeout=process.TICK)
            if ready:
                break
            if asked() > wish:
                wish = asked()
                shared.ask_to_stop(child, wish)
                if wish == process.KILL or process.is_free(child):  # waiting for a machine
                    self._ray.cancel(task, force=True)
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayError as e:
            return process.Outcome(1, f"Ray: {shared.gist(e)}", lost=True)
        finally:
            shared.no_stop(child)

    def close(self) -> None:
        """Leave the cluster, if this engine joined it."""
        if self._owner:
            self._ray.shutdown()
