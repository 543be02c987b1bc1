"""Several processes are one run: equal losses, checkpoints that fit any mesh, a clean end."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sparse_pretrain.training import processes
from tests.training import cluster
from tests.training import processes as runs


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("host:1", 2, -1), "--process-id: needed"),
        (("", 2, 0), "--coordinator: needed"),
        (("host:1", 2, 2), "--process-id: 2 is not below --processes 2"),
    ],
)
def test_half_of_the_options_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        processes.start(*given)


def test_one_process_has_nobody_to_wait_for():
    processes.start()
    assert processes.lead()
    assert not processes.several()
    asked: list[int] = []
    stop = processes.Stop(asked)
    assert not stop.now(1)
    asked.append(signal.SIGTERM)
    assert stop.now(2)
    assert processes.lost(RuntimeError("connection closed by peer")) is None


@pytest.mark.slow
def test_processes_times_devices_equal_one_process_and_resume_on_another_mesh(tmp_path):
    alone = runs.start(tmp_path, "alone", processes=1, devices=8, mesh="expert=4")
    one = runs.finish(tmp_path, "alone", alone)
    four = runs.start(tmp_path, "four", processes=4, devices=2, mesh="expert=4")
    np.testing.assert_allclose(runs.finish(tmp_path, "four", four), one, atol=1e-5, rtol=0)
    assert len(one) == 6


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_ends_within_a_minute_of_the_other_the_coordinator_too(tmp_path, victim):
    """Killed while steps are compiled or taken, whichever it is by then."""
    running = runs.start(tmp_path, "pair", processes=2, devices=2, mesh="expert=2", steps=5000)
    while not (tmp_path / "pair" / "run.json").exists():
        assert all(p.poll() is None for p in running), "ended before it began"
        time.sleep(0.05)
    os.kill(running[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    other = running[1 - victim]
    running[victim].wait()
    assert other.wait(60) == processes.FAILED
    assert time.monotonic() - began < 60
    said = (tmp_path / f"pair.{1 - victim}.log").read_text()
    last = said.splitlines()[-1]
    assert last.startswith(f"error: process {1 - victim} of 2: another process of the run is gone")


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_other_devices_go_on(tmp_path):
    whole = runs.start(tmp_path, "whole", processes=1, devices=8, mesh="expert=4", steps=200)
    running = runs.start(tmp_path, "lost", processes=4, devices=2, mesh="expert=4", steps=200)
    path = tmp_path / "lost" / "checkpoints"
    while not any(path.glob("00000*[0-9]")):
        assert all(p.poll() is None for p in running), "ended before the first checkpoint"
        time.sleep(0.05)
    os.kill(running[2].pid, signal.SIGKILL)
    at = max(int(p.name) for p in path.glob("00000*[0-9]"))  # that it goes on from
    began = time.monotonic()
    for i, process in enumerate(running):
        process.wait(60)
        if i != 2:
            assert process.returncode == 1
            assert "is gone" in (tmp_path / f"lost.{i}.log").read_text()
    assert time.monotonic() - began < 60
    again = runs.start(tmp_path, "lost", processes=3, devices=2, mesh="expert=2", steps=200)
    found = np.array(runs.finish(tmp_path, "lost", again))
    alone = np.array(runs.finish(tmp_path, "whole", whole))
    np.testing.assert_allclose(found[: at + 20], alone[: at + 20], atol=1e-5)
    # further on the rounding of another mesh has turned a choice of experts: the curve is the same
    assert abs(found[-50:].mean() - alone[-50:].mean()) < 1e-3
    assert len(found) == len(alone) == 200


@pytest.mark.slow
def test_an_abort_that_no_other_process_caused_takes_its_course(tmp_path):
    code = (
        "import os, jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from sparse_pretrain.training import processes\n"
        f"processes.start('127.0.0.1:{runs.port()}', 1, 0)\n"
        "os.abort()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGABRT
    assert "is gone" not in ended.stderr


FOUND = """
import os
import jax
jax.config.update("jax_platforms", "cpu")
from sparse_pretrain.training import processes
processes.start()
from jax.experimental import multihost_utils
there = multihost_utils.process_allgather(jax.numpy.asarray([10 + jax.process_index()]))
said = f"process {jax.process_index()} of {jax.process_count()} {there.ravel().tolist()}"
os.write(1, f"{said}\\n".encode())  # whole, where mpirun mixes what its processes write
"""


def by_srun(count):
    """What srun sets for each task of a step; JAX takes the coordinator's port from the job."""
    first = 2**16 - 2**12
    where = runs.port(range(first + os.getpid() % 2**11, 2**16))
    same = {
        "SLURM_JOB_ID": str(where - first), "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    for i in range(count):
        yield [], same | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}


def by_mpirun(count):
    """Open MPI itself, where it is installed."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    yield ["mpirun", "-n", str(count), "--allow-run-as-root", "--oversubscribe"], {}


def by_kubernetes(count):
    """What an indexed Job sets in its pods, whose API and names tests/training/cluster.py makes."""
    here = cluster.Cluster(cluster.manifest())
    same = {"JAX_COORDINATOR_PORT": str(runs.port()), "PODS": str(count)}
    for i in range(count):
        yield [], same | here.environment(i)


POD = """
import os, sys
sys.path.insert(0, os.getcwd())
if "PODS" in os.environ:
    from tests.training import cluster
    cluster.enter(int(os.environ["PODS"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_srun, by_mpirun, by_kubernetes])
def test_processes_find_each_other_by_what_a_launcher_sets(launcher):
    count, pipe = 3, subprocess.PIPE
    running = [
        subprocess.Popen([*command, sys.executable, "-c", POD + FOUND], env=os.environ | more,
                         stdout=pipe, stderr=pipe, text=True, cwd=cluster.README.parent)
        for command, more in launcher(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in running]
    assert not any(process.returncode for process in running), said
    lines = "".join(out for out, _ in said).splitlines()  # gloo speaks among them
    lines = sorted(line for line in lines if line.startswith("process "))
    assert lines == [f"process {i} of {count} [10, 11, 12]" for i in range(count)]


MISSING = {
    "Open MPI": ("mpi4py", "mpi4py",
                 {f"OMPI_COMM_WORLD_{name}": n for name, n in
                  (("SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"))}),
    "Kubernetes": ("kubernetes", "'jax[k8s]'",
                   {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", MISSING)
def test_a_launcher_that_jax_cannot_ask_is_named_with_what_it_needs(launcher):
    """JAX asks mpi4py of Open MPI 5, and its API of Kubernetes; neither is a dependency."""
    module, install, more = MISSING[launcher]
    command = [sys.executable, "-c", f"import sys; sys.modules['{module}'] = None\n" + FOUND]
    ended = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: --coordinator: {launcher} started this process, and JAX")
    told = f"pip install {install}, or give --coordinator, --processes, --process-id"
    assert last.endswith(told)


def test_the_readmes_job_tells_jax_who_is_there(monkeypatch):
    """Names, numbers and permissions as JAX reads them; without any of these it says so."""
    objects = cluster.manifest()
    here = cluster.Cluster(objects)
    count = objects["Job"]["spec"]["parallelism"]
    assert count == objects["Job"]["spec"]["completions"] > 1

    def asked(index):
        monkeypatch.setitem(sys.modules, "kubernetes", cluster.package(here))
        monkeypatch.setattr(cluster.socket, "gethostbyname", lambda host: here.hosts()[host])
        monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
        for name, value in here.environment(index).items():
            monkeypatch.setenv(name, value)
        jax_asks = cluster.fresh()
        assert jax_asks.is_env_present()
        address = jax_asks.get_coordinator_address(1, None)
        return address, jax_asks.get_process_count(), jax_asks.get_process_id()

    for i in range(count):
        address, found, me = asked(i)
        assert (found, me) == (count, i)
        host = address.split(":")[0]
        assert here.hosts()[host] == here.hosts()[f"{here.name}-0"]
        assert processes._launched() == "Kubernetes"
    command = here.pod["containers"][0]["command"]
    assert command[:2] == ["sparse-pretrain", "train"]
    del here.spec["completionMode"]
    with pytest.raises(RuntimeError, match="completionMode"):
        asked(0)
    assert not processes._launched()
    objects["Role"]["rules"] = [r for r in objects["Role"]["rules"] if "pods" in r["resources"]]
    with pytest.raises(RuntimeError, match="403"):
        asked(0)
