"""A cluster of Kubernetes as one pod's JAX sees it, made of the manifest in the README.

Its names, addresses, labels, permissions and what its API answers follow from the manifest as
Kubernetes' documentation says they would. What JAX asks is JAX's own code.
"""

import os
import re
import socket
import sys
import types
from pathlib import Path

import yaml
from jax._src import clusters
from jax._src.clusters.k8s_cluster import K8sCluster

README = Path(__file__).parents[2] / "README.md"


def manifest() -> dict[str, dict]:
    """Its objects by kind."""
    (text,) = re.findall(r"^```yaml\n(.*?kind: Job.*?)^```", README.read_text(), re.M | re.S)
    objects = [o for o in yaml.safe_load_all(text) if o]
    found = {o["kind"]: o for o in objects}
    assert len(found) == len(objects)
    return found


class Forbidden(Exception):
    """ApiException of the package kubernetes."""

    status, reason = 403, "Forbidden"


class Cluster:
    """What the manifest makes, with pods on loopback addresses."""

    def __init__(self, objects: dict[str, dict]):
        self.objects, self.job = objects, objects["Job"]
        self.name, self.spec = self.job["metadata"]["name"], self.job["spec"]
        self.pod = self.spec["template"]["spec"]
        self.labels = {"job-name": self.name, "batch.kubernetes.io/job-name": self.name}

    def hosts(self) -> dict[str, str]:
        """Name -> address of every pod, also under its service's name where that selects it."""
        service, found = self.objects["Service"], {}
        chosen = service["spec"]["selector"].items() <= self.labels.items()
        # names of pods that are not ready yet are told only where the service says so
        told = service["spec"]["clusterIP"] == "None" and service["spec"][
            "publishNotReadyAddresses"
        ]
        for i in range(self.spec["parallelism"]):
            found[f"{self.name}-{i}"] = f"127.0.0.{10 + i}"
            if chosen and told and self.pod.get("subdomain") == service["metadata"]["name"]:
                found[f"{self.name}-{i}.{self.pod['subdomain']}"] = f"127.0.0.{10 + i}"
        return found

    def environment(self, index: int) -> dict[str, str]:
        """What a pod's processes find set."""
        found = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": f"{self.name}-{index}"}
        if self.spec.get("completionMode") == "Indexed":
            found["JOB_COMPLETION_INDEX"] = str(index)
        return found

    def allow(self, verb: str, group: str, resource: str) -> None:
        """Raises where the pod's account may not do this."""
        role, binding = self.objects["Role"], self.objects["RoleBinding"]
        account = self.objects["ServiceAccount"]["metadata"]["name"]
        bound = binding["roleRef"]["name"] == role["metadata"]["name"] and any(
            s["kind"] == "ServiceAccount" and s["name"] == account for s in binding["subjects"]
        )
        if not (
            bound
            and self.pod.get("serviceAccountName") == account
            and any(
                verb in r["verbs"] and group in r["apiGroups"] and resource in r["resources"]
                for r in role["rules"]
            )
        ):
            raise Forbidden

    def list_namespaced_pod(self, *, namespace: str, field_selector: str):
        """The pods of this address."""
        self.allow("list", "", "pods")
        field, _, address = field_selector.partition("=")
        assert (namespace, field) == ("here", "status.podIP")
        (name,) = [h for h, a in self.hosts().items() if a == address and "." not in h]
        owner = types.SimpleNamespace(controller=True, kind="Job", name=self.name)
        data = types.SimpleNamespace(name=name, labels=self.labels, owner_references=[owner])
        spec = types.SimpleNamespace(subdomain=self.pod.get("subdomain"))
        return types.SimpleNamespace(items=[types.SimpleNamespace(metadata=data, spec=spec)])

    def read_namespaced_job(self, *, name: str, namespace: str):
        """The job."""
        self.allow("get", "batch", "jobs")
        assert (name, namespace) == (self.name, "here")
        data = types.SimpleNamespace(name=name, labels={})
        spec = types.SimpleNamespace(parallelism=self.spec["parallelism"])
        return types.SimpleNamespace(metadata=data, spec=spec)


def package(cluster: Cluster) -> types.ModuleType:
    """The package kubernetes, of which JAX uses this much."""

    def load_incluster_config():
        assert os.environ["KUBERNETES_SERVICE_HOST"]

    found = types.ModuleType("kubernetes")
    found.config = types.SimpleNamespace(load_incluster_config=load_incluster_config)
    found.client = types.SimpleNamespace(
        CoreV1Api=lambda: cluster,
        BatchV1Api=lambda: cluster,
        exceptions=types.SimpleNamespace(ApiException=Forbidden),
    )
    return found


def fresh() -> type[K8sCluster]:
    """JAX's class, whose answers are kept per class."""
    found = type("Here", (K8sCluster,), {"_namespace": classmethod(lambda cls: "here")})
    clusters.ClusterEnv._cluster_types.remove(found)
    return found


def enter(parallelism: int) -> None:
    """Makes this process a pod's: the package, the cluster's names, the account's namespace.

    gRPC resolves names itself, so the coordinator's is given to it as an address.
    """
    objects = manifest()
    objects["Job"]["spec"]["parallelism"] = parallelism
    cluster = Cluster(objects)
    sys.modules["kubernetes"] = package(cluster)
    socket.gethostbyname = lambda host: cluster.hosts()[host]
    K8sCluster._namespace = classmethod(lambda cls: "here")
    asked = K8sCluster.get_coordinator_address

    def address(*args, **kwargs):
        host, port = asked(*args, **kwargs).split(":")
        return f"{cluster.hosts()[host]}:{port}"

    K8sCluster.get_coordinator_address = address
