"""KubeRay's ray.io/v1 resources as a JSON schema: fields that RayCluster and RayJob have had since KubeRay 1.4, and
authOptions of 1.5.1, which the templates ask for. Newer fields are errors here.

Written from the field tables of KubeRay's API reference (docs.ray.io, "KubeRay CRD API reference"; the project's
docs/reference/api.md), because its CRDs are in no package. What Kubernetes defines itself (pod templates, services)
refers to Kubernetes' own definitions, in which unknown fields are errors.
"""

import json
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from kubernetes_validate import latest_version
from referencing import Registry, Resource

Schema = dict[str, Any]
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"  # the name they go by, not where they are read
STRING, BOOLEAN, INTEGER = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": STRING}


def _kubernetes(name: str) -> Schema:
    return {"$ref": f"{DEFINITIONS}#/$defs/io.k8s.{name}"}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


POD_TEMPLATE = _kubernetes("api.core.v1.PodTemplateSpec")
CREDENTIAL = _object(value=STRING, valueFrom=_kubernetes("api.core.v1.EnvVarSource"))
HEAD_GROUP = _object(
    ("template",),
    template=POD_TEMPLATE,
    headService=_kubernetes("api.core.v1.Service"),
    enableIngress=BOOLEAN,
    rayStartParams=TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
)
WORKER_GROUP = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=STRING,
    replicas=INTEGER,
    minReplicas=INTEGER,
    maxReplicas=INTEGER,
    idleTimeoutSeconds=INTEGER,
    numOfHosts=INTEGER,
    suspend=BOOLEAN,
    rayStartParams=TEXTS,
    scaleStrategy=_object(workersToDelete=_list(STRING)),
    template=POD_TEMPLATE,
)
AUTOSCALER = _object(
    resources=_kubernetes("api.core.v1.ResourceRequirements"),
    image=STRING,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    securityContext=_kubernetes("api.core.v1.SecurityContext"),
    idleTimeoutSeconds=INTEGER,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    env=_list(_kubernetes("api.core.v1.EnvVar")),
    envFrom=_list(_kubernetes("api.core.v1.EnvFromSource")),
    volumeMounts=_list(_kubernetes("api.core.v1.VolumeMount")),
)
CLUSTER_SPEC = _object(
    ("headGroupSpec",),
    rayVersion=STRING,
    suspend=BOOLEAN,
    managedBy=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    authOptions=_object(mode={"enum": ["disabled", "token"]}),
    gcsFaultToleranceOptions=_object(
        ("redisAddress",),
        redisAddress=STRING,
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
        externalStorageNamespace=STRING,
    ),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=_list(WORKER_GROUP),
)
JOB_SPEC = _object(
    activeDeadlineSeconds=INTEGER,
    backoffLimit=INTEGER,
    clusterSelector=TEXTS,
    entrypoint=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    jobId=STRING,
    managedBy=STRING,
    metadata=TEXTS,
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    submitterConfig=_object(backoffLimit=INTEGER),
    submitterPodTemplate=POD_TEMPLATE,
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
)
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    schema = _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": document["kind"]},
        metadata=_kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec=SPECS[document["kind"]],
    )
    folder = files("kubernetes_validate") / "kubernetes-json-schema"
    definitions = json.loads((folder / f"v{latest_version()}-local-strict" / "_definitions.json").read_text())
    registry = Resource.from_contents(definitions) @ Registry()
    Draft202012Validator(schema, registry=registry).validate(document)
