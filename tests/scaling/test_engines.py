"""Engines for many machines, for real: a Ray cluster on loopback, submitit's executors."""

import io
import os
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from sparse_pretrain.report import workdir
from sparse_pretrain.scaling import engines, process, sweep
from sparse_pretrain.scaling.children import children

TRIVIAL = Path(__file__).parents[2] / "experiments" / "benchmarks" / "trivial_child.py"
TRAINER = f"""
import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("trivial_child", {str(TRIVIAL)!r})
trivial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trivial)
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
workdir, how = flags["workdir"], flags.get("config.how", "")
os.makedirs(workdir, exist_ok=True)
with open(workdir + "/where", "a") as f:
    f.write(os.environ.get("RAY_RAYLET_PID", "here"))
    f.write(" " + str(os.getppid()) + "\\n")
if how == "mistake":
    print("error: optim.lr: must be positive")
    sys.exit(2)
if how == "killed" and len(open(workdir + "/where").readlines()) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "long":
    def stop(*unused):
        open(workdir + "/saved", "w").close()
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    open(workdir + "/ready", "w").close()
    time.sleep(120)
sys.exit(trivial.run(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path):
    """A sweep of settings named by how they end, and a way to run it on an engine."""

    class Place:
        root = tmp_path / "out"
        file = tmp_path / "s.py"
        trainer = tmp_path / "trainer.py"
        prefix = (sys.executable, "-S", str(trainer))

        def sweep(self, hows):
            pairs = [("tiny.py", {"how": how}) for how in hows]
            self.file.write_text(f"def get_sweep():\n    return {pairs!r}\n")
            return children(self.file, self.root)

        def run(self, name, workers=2, **options):
            more = {"workers": workers, "root": self.root, "prefix": self.prefix}
            engine = engines.make(name, options=options, **more)
            console = Console(file=io.StringIO(), width=150)
            return sweep.run_sweep(
                self.file, self.root, engine, workers=workers, retries=1, console=console
            )

    (tmp_path / "tiny.py").write_text("def get_config(arg=None):\n    return {}\n")
    made = Place()
    made.trainer.write_text(TRAINER)
    return made


def check_ends(record):
    got = {
        c["overrides"]["how"]: (c["status"], c["cause"], c["attempts"]) for c in record["children"]
    }
    assert got == {
        "mistake": ("failed", "optim.lr: must be positive", 1),
        "killed": ("finished", "", 2),
        "a": ("finished", "", 1),
        "b": ("finished", "", 1),
    }
    assert [c["causes"] for c in record["children"]][1] == ["killed by SIGKILL"]


def check_interrupt(place, name, **options):
    """Ctrl-C reaches a child on another machine, which saves."""
    (child,) = place.sweep(["long"])

    def interrupt():
        while not (child.workdir / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    record = place.run(name, **options)
    thread.join()
    assert record["interrupted"]
    assert record["children"][0]["status"] == "interrupted"
    assert (child.workdir / "saved").exists()


@pytest.fixture
def cluster():
    """Two Ray nodes of a core each, on the loopback address."""
    from sparse_pretrain.scaling.engines.on_ray import LOOPBACK, stay_on_loopback

    stay_on_loopback()
    ray = pytest.importorskip("ray", reason="extra 'ray': ray is not installed")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": LOOPBACK}
    node["object_store_memory"] = 80 << 20
    made = Cluster(initialize_head=True, head_node_args=node)
    made.add_node(num_cpus=1, object_store_memory=80 << 20, node_ip_address=LOOPBACK)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_on_two_nodes(place, cluster):
    todo = place.sweep(["mistake", "killed", "a", "b"])
    check_ends(place.run("ray", address=cluster.address))
    nodes = {
        line.split()[0] for c in todo for line in (c.workdir / "where").read_text().splitlines()
    }
    assert len(nodes) == 2
    check_interrupt(place, "ray", address=cluster.address)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_loses_a_node_and_no_run(place, cluster):
    """The node under a child dies; the child goes on from another."""
    (child,) = place.sweep([""])
    chips = {"num_cpus": 1, "resources": {"TPU": 1}, "node_ip_address": "127.0.0.1"}
    nodes = [cluster.add_node(**chips) for _ in range(2)]
    ready = 'open(workdir + "/ready", "w").close()\ntime.sleep(2)\nsys.exit(trivial'
    place.trainer.write_text(TRAINER.replace("sys.exit(trivial", ready))

    def remove():
        while not (child.workdir / "ready").exists():
            time.sleep(0.02)
        raylet = int((child.workdir / "where").read_text().split()[0])
        (under,) = (n for n in nodes if n.all_processes["raylet"][0].process.pid == raylet)
        cluster.remove_node(under, allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    record = place.run("ray", address=cluster.address, tpus="1")
    thread.join()
    assert record["children"][0]["status"] == "finished"
    assert "Ray: NodeDiedError" in record["children"][0]["causes"][0]


def test_ray_that_is_not_there(place, monkeypatch):
    place.sweep(["a"])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--engine=ray needs the package 'ray' .*\[ray\]"):
        place.run("ray")
    with pytest.raises(ValueError, match="--option: 'gpu' of the engine ray is not one of address"):
        place.run("ray", gpu="1")


def test_submitit_local(place):
    pytest.importorskip("submitit", reason="extra 'slurm': submitit is not installed")
    place.sweep(["mistake", "killed", "a", "b"])
    check_ends(place.run("slurm", cluster="local"))
    check_interrupt(place, "slurm", cluster="local")


# A scheduler of three commands: jobs start at once, and are what their processes are.
SBATCH = """#!/bin/sh
n=$(( $(ls {jobs} | wc -l) + 1 ))
out=$(grep -o -- '--output=[^ ]*' "$1" | cut -d= -f2 | sed "s/%j/$n/;s/%t/0/")
SLURM_JOB_ID=$n setsid sh "$1" > /dev/null 2>&1 &
echo $! > {jobs}/$n
echo "Submitted batch job $n"
"""
SRUN = """#!/bin/sh
while [ "$1" != "${1#--}" ]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
export SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=localhost SLURMD_NODENAME=localhost
exec "$@"
"""
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
for f in {jobs}/*; do
  s=COMPLETED; kill -0 $(cat $f) 2> /dev/null && s=RUNNING
  echo "$(basename $f)|$s|localhost"
done
"""


def test_slurm_jobs_outlive_their_driver(place, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="extra 'slurm': submitit is not installed")
    bin, jobs = tmp_path / "bin", tmp_path / "jobs"
    bin.mkdir()
    jobs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (bin / name).write_text(text.replace("{jobs}", str(jobs)))
        (bin / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setattr(submitit.slurm.slurm.SlurmJob.watcher, "_delay_s", 1)
    place.sweep(["a", "b"])
    record = place.run("slurm", timeout_min="3", slurm_partition="gpu")
    assert [c["status"] for c in record["children"]] == ["finished"] * 2
    assert len(list(jobs.iterdir())) == 2
    assert "--partition=gpu" in next((place.root / "slurm").glob("*.sh")).read_text()


def test_slurm_mistakes_are_one_line(place, monkeypatch):
    place.sweep(["a"])
    pytest.importorskip("submitit", reason="extra 'slurm': submitit is not installed")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"--engine=slurm: Could not detect .srun."):
        place.run("slurm")
    with pytest.raises(ValueError, match=r"--engine=slurm: .*timeout_min.*abc"):
        place.run("slurm", cluster="local", timeout_min="abc")
    with pytest.raises(ValueError, match="cluster=moon is not one of slurm, local"):
        place.run("slurm", cluster="moon")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"--engine=slurm needs the package 'submitit'.*\[slurm\]"):
        place.run("slurm", cluster="local")


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path, place):
    from sparse_pretrain.scaling.engines import shared

    (child,) = place.sweep(["a"])
    outcome = shared.execute(child)
    assert outcome.code == process.MISTAKE
    assert f"does not see {place.root}" in outcome.words
    assert workdir.read(child.workdir).status == "failed"
