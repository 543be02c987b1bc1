"""Children as jobs of SLURM, by submitit; or of its local executor, which needs no cluster."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain.scaling import engines, process
from sparse_pretrain.scaling.children import Child
from sparse_pretrain.scaling.engines import shared

MINUTES = 24 * 60  # of a job, unless told otherwise; submitit's own default is 5


class OnSlurm:
    """A job a child, at most `workers` in the queue.

    Options: those of submitit's `update_parameters` (slurm_partition, gpus_per_node, mem_gb,
    timeout_min and so on), and `cluster`, slurm or local (default: slurm). A job
    that was queued or running when its driver was killed is found again by its number, and waited
    for. A job at its time limit saves, and goes on in another.
    Errors: ValueError when submitit is not installed, or an option is none of its.
    """

    def __init__(
        self,
        *,
        workers: int,
        root: Path,
        options: Mapping[str, str] | None = None,
        prefix: Sequence[str] = process.PREFIX,
    ):
        del workers
        self._submitit = engines.needs("submitit", "slurm", "--engine=slurm")
        given = dict(options or {})
        cluster = given.pop("cluster", "slurm")
        if cluster not in ("slurm", "local"):
            raise ValueError(f"--option: cluster={cluster} is not one of slurm, local")
        self._folder, self._prefix = root / "slurm", tuple(prefix)
        try:
            self._executor = self._submitit.AutoExecutor(folder=self._folder, cluster=cluster)
            values = {"timeout_min": MINUTES} | {k: _value(v) for k, v in given.items()}
            self._executor.update_parameters(name=root.name, **values)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as e:
            raise ValueError(f"--engine=slurm: {_last_line(e)}") from None

    def run(self, child: Child, asked: process.Asked) -> process.Outcome:
        """As a job; one that left no result is lost."""
        job = self._earlier(child)
        if job is None:
            shared.no_stop(child)
            job = self._executor.submit(shared.execute, child, self._prefix)
            self._number(child).parent.mkdir(parents=True, exist_ok=True)
            self._number(child).write_text(str(job.job_id))
        wish = 0
        while not job.done():
            if asked() > wish:
                wish = asked()
                shared.ask_to_stop(child, wish)
                if wish == process.KILL or job.state == "PENDING":
                    job.cancel(check=False)
            time.sleep(process.TICK)
        try:
            return job.result()
        except Exception as e:  # its own errors have no common base
            return process.Outcome(1, f"job {job.job_id}: {_last_line(e)}", lost=True)
        finally:
            shared.no_stop(child)
            self._number(child).unlink(missing_ok=True)

    def _number(self, child: Child) -> Path:
        claim = process.claim_file(child)
        return claim.with_name(f"{claim.name}.job")

    def _earlier(self, child: Child) -> Any:
        """The job that an earlier driver has left with the scheduler, if it is there still."""
        if self._executor.cluster != "slurm" or not self._number(child).exists():
            return None  # a local job is found by its claim
        number = self._number(child).read_text().strip()
        job = self._submitit.SlurmJob(folder=self._folder, job_id=number)
        job.get_info(mode="force")
        return None if job.done(force_check=True) else job

    def close(self) -> None:
        """Nothing is held."""


def _value(text: str) -> Any:
    """A number where it looks like one: submitit checks types."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _last_line(error: BaseException) -> str:
    lines = [x.strip(" -") for x in str(error).splitlines() if x.strip(" -")]
    return lines[0][:300] if lines else type(error).__name__
