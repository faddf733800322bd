"""cluster/ray: what Ray's cluster launcher reads, and what the clouds' own clients let it ask for."""

import json
from pathlib import Path
from typing import Any

import pytest
from cluster_files import documents, project
from ray.autoscaler._private.util import prepare_config, validate_config

CLOUDS = ("aws", "gcp")


def config(cloud: str, **values: str) -> dict[str, Any]:
    (found,) = documents(f"ray/{cloud}.yaml", **values)
    return found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_file(cloud: str) -> None:
    prepared = prepare_config(config(cloud))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepared | {"idle_timeout_minuts": 1})


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ranks_come_on_spot_machines_that_watch_for_their_end(cloud: str) -> None:
    found = config(cloud)
    assert found["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert any(f"watch-preemption {cloud}" in command for command in found["worker_start_ray_commands"])
    images = [found["docker"][f"{kind}_image"].split(":")[-1] for kind in ("head", "worker")]
    assert images == [f"{project()['version']}-cpu", f"{project()['version']}-cuda"]


def test_ec2_knows_every_field() -> None:
    from botocore.session import Session
    from botocore.validate import ParamValidator

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    counts = {"MinCount": 1, "MaxCount": 1}
    for name, node in config("aws")["available_node_types"].items():
        assert not ParamValidator().validate(node["node_config"] | counts, shape).has_errors(), name
    assert ParamValidator().validate({"InstanceTyp": "m6i.xlarge"} | counts, shape).has_errors()


@pytest.mark.exhaustive
def test_ray_starts_spot_machines_on_a_simulated_ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray up` does: network, security group and key are found or made, then a worker is started."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray puts a new key there
    (tmp_path / ".ssh").mkdir()
    import boto3
    from moto import mock_aws
    from ray.autoscaler import tags
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    with mock_aws():
        image = boto3.client("ec2", region_name="us-west-2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for name in ("head", "worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        places = {"AWS_REGION": "us-west-2", "AWS_ZONE": "us-west-2a", "AMI": image}
        profiles = {"HEAD_PROFILE": "head", "INSTANCE_PROFILE": "worker"}
        prepared = AWSNodeProvider.fillout_available_node_types_resources(
            prepare_config(config("aws", **places, **profiles))
        )
        assert prepared["available_node_types"]["gpu"]["resources"]["GPU"] == 4
        ready = bootstrap_aws(prepared)
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        labels = {
            tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_WORKER,
            tags.TAG_RAY_USER_NODE_TYPE: "gpu",
            tags.TAG_RAY_NODE_NAME: "worker",
            tags.TAG_RAY_NODE_STATUS: tags.STATUS_UNINITIALIZED,
            tags.TAG_RAY_LAUNCH_CONFIG: "none",
        }
        started = provider.create_node(ready["available_node_types"]["gpu"]["node_config"], labels, 1)
        assert [(node.instance_type, node.instance_lifecycle) for node in started.values()] == [("g6.12xlarge", "spot")]
        assert provider.non_terminated_nodes({tags.TAG_RAY_USER_NODE_TYPE: "gpu"}) == list(started)


def unknown_fields(value: Any, schema: dict[str, Any], schemas: dict[str, Any], path: str = "") -> list[str]:
    """Where `value` leaves a schema of a Google discovery document: unknown keys, values out of their enumeration."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if isinstance(value, dict):
        known, found = schema.get("properties", {}), []
        for key, one in value.items():
            inner = known.get(key, schema.get("additionalProperties"))
            found += [f"{path}.{key}"] if inner is None else unknown_fields(one, inner, schemas, f"{path}.{key}")
        return found
    if isinstance(value, list):
        return [place for one in value for place in unknown_fields(one, schema["items"], schemas, f"{path}[]")]
    return [] if value in schema.get("enum", [value]) else [f"{path}={value}"]


def test_compute_engine_knows_every_field() -> None:
    google = pytest.importorskip(
        "googleapiclient", reason="google-api-python-client, which `ray up` needs on Google Cloud, is not installed"
    )
    document = Path(google.__file__).parent / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(document.read_text())["schemas"]
    for name, node in config("gcp")["available_node_types"].items():
        assert unknown_fields(node["node_config"], {"$ref": "Instance"}, schemas) == [], name
    broken = {"scheduling": {"provisioningModel": "SPOTTY"}, "machineTyp": "n2-standard-4"}
    assert unknown_fields(broken, {"$ref": "Instance"}, schemas) == [
        ".scheduling.provisioningModel=SPOTTY",
        ".machineTyp",
    ]
