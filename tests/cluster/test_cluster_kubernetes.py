"""cluster/kuberay: what KubeRay and Kubernetes accept, nothing privileged, nothing unbounded."""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kuberay_schema
import kubernetes_validate
import pytest
import yaml
from cluster_files import CLUSTER, documents, pin

from data_pipeline.errors import GenattError
from genatt_dist.training import heartbeat
from genatt_dist.training.options import TrainingConfig
from jobs import options

FILES = ("raycluster.yaml", "rayjob.yaml", "redis.yaml", "train-job.yaml")


def all_documents() -> list[dict[str, Any]]:
    return [document for name in FILES for document in documents(f"kuberay/{name}")]


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Every pod's specification, with a name for messages."""
    found = []
    for document in all_documents():
        spec = document.get("spec", {})
        cluster = spec.get("rayClusterSpec", spec)
        if "headGroupSpec" in cluster:
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            found += [(f"{document['kind']} {g.get('groupName', 'head')}", g["template"]["spec"]) for g in groups]
        elif "template" in spec:
            found.append((document["kind"], spec["template"]["spec"]))
    return found


@pytest.mark.parametrize("document", all_documents(), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_resources_are_what_kubernetes_and_kuberay_know(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        kuberay_schema.validate(document)
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "gcsFaultToleranceOptions", "redisAdress"), "redis:6379"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resourcs"), {}),
        (("spec", "headGroupSpec", "template", "spec", "volumes", 0, "emptyDir", "medium"), 1),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "autoscalerOptions", "version"), "v3"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_slip_is_found(where: tuple[Any, ...], value: Any) -> None:
    (cluster,) = documents("kuberay/raycluster.yaml")
    broken = copy.deepcopy(cluster)
    place = broken
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        kuberay_schema.validate(broken)


def test_a_job_gets_the_cluster_of_raycluster_yaml_without_redis() -> None:
    (cluster,), (_, job) = documents("kuberay/raycluster.yaml"), documents("kuberay/rayjob.yaml")
    wanted = {key: value for key, value in cluster["spec"].items() if key != "gcsFaultToleranceOptions"}
    found = copy.deepcopy(job["spec"]["rayClusterSpec"])
    head = found["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [volume for volume in head["volumes"] if volume["name"] != "job"]
    container = head["containers"][0]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "job"]
    assert found == wanted


def test_the_jobs_document_is_one_the_job_reads() -> None:
    config_map, job = documents("kuberay/rayjob.yaml")
    assert job["spec"]["entrypoint"] == "python -m jobs.pipeline /job/job.yaml"
    tree = yaml.safe_load(config_map["data"]["job.yaml"])
    pipeline = options.of_pipeline(tree["config"])
    assert pipeline.prepare is not None
    assert pipeline.prepare.out == pipeline.train.data.path == f"{tree['run']}-shards"
    with pytest.raises(GenattError, match=r"did you mean report\?"):
        options.of_pipeline(tree["config"] | {"reprot": {}})


def test_ray_is_the_version_of_pyproject() -> None:
    (cluster,) = documents("kuberay/raycluster.yaml")
    assert cluster["spec"]["rayVersion"] == pin("ray")


@pytest.mark.parametrize(("name", "pod"), pods(), ids=[name for name, _ in pods()])
def test_pods_ask_for_what_they_may_use_and_nothing_privileged(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in pod["containers"]:
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not [entry for entry in container.get("env", []) if "KEY" in entry["name"] and "value" in entry]


@pytest.mark.parametrize(("name", "pod"), [p for p in pods() if p[0] != "StatefulSet"], ids=str)
def test_pods_that_train_have_shared_memory_credentials_and_time_to_stop(name: str, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert {"secretRef": {"name": "genatt-s3"}} in container["envFrom"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (mount,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    memory = volumes[mount["name"]]["emptyDir"]
    assert memory["medium"] == "Memory"
    gibibytes = [
        int(text.removesuffix("Gi")) for text in (memory["sizeLimit"], container["resources"]["limits"]["memory"])
    ]
    assert 0.25 < gibibytes[0] / gibibytes[1] < 0.35  # Ray's object store: 30 % of the memory
    stop = TrainingConfig().stop_seconds
    drain = {entry["name"]: entry["value"] for entry in container.get("env", [])}.get(
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    )
    if drain is not None:
        assert stop < float(drain) < pod["terminationGracePeriodSeconds"]
    else:
        assert stop + 10 < pod["terminationGracePeriodSeconds"]


def test_the_jobs_exit_codes_decide_what_follows() -> None:
    (job,) = documents("kuberay/train-job.yaml")
    rules = {
        value: rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        for value in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {2: "FailJob", 75: "Count"}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # the policy needs it


def test_the_jobs_probes_ask_for_the_heartbeat(tmp_path: Path) -> None:
    (container,) = documents("kuberay/train-job.yaml", RUN="first")[0]["spec"]["template"]["spec"]["containers"]
    words = container["livenessProbe"]["exec"]["command"]
    assert words[:3] == ["python", "-m", "genatt_dist.training.heartbeat"]
    arguments = [str(tmp_path) if word == "/runs/first" else word for word in words[3:]]
    assert heartbeat.main(arguments) == 1
    heartbeat.write(tmp_path, {"step": 1})
    assert heartbeat.main(arguments) == 0
    assert container["startupProbe"]["exec"] == container["livenessProbe"]["exec"]


@pytest.mark.parametrize("flag", ["", "--resume"])
def test_the_jobs_script_starts_or_resumes(flag: str, tmp_path: Path) -> None:
    (container,) = documents("kuberay/train-job.yaml", RUN="first", CONFIG="run.yaml")[0]["spec"]["template"]["spec"][
        "containers"
    ]
    for name, text in {"genatt": 'echo "genatt $*"', "resume-flag": f"echo {flag}"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    program, option, script = container["args"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = script.replace("/app/cluster/resume-flag", str(tmp_path / "resume-flag"))
    said = subprocess.run(
        [program, option, script], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    ).stdout
    words = ["genatt", "train", "/runs/run.yaml", *([flag] if flag else []), "--run", "/runs/first"]
    assert said.split() == [*words, "--launcher", "torchrun"]
    assert (CLUSTER / "resume-flag").exists()  # /app is the checkout
