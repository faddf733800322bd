"""A local S3 with ml-100k in a bucket, a live cluster beside it, and what the pipeline there says undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import boto3
import pytest
import yaml
from live_jobs import BUCKET, KEYS, LAST_STEP, ML_100K, PIPELINE, UNDISTURBED, Live
from ray_cluster import Cluster, s3_server


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One cluster for a module."""
    if not ML_100K.is_dir():
        pytest.skip(f"no ml-100k at {ML_100K}")
    with s3_server() as endpoint:
        keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "only", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=endpoint, **keys)
        client.create_bucket(Bucket=BUCKET)
        for name in ("interactions.parquet", "items.parquet"):
            client.put_object(Bucket=BUCKET, Key=f"raw/{name}", Body=(ML_100K / name).read_bytes())
        environment = dict(zip(KEYS, (endpoint, *keys.values()), strict=True))
        pipeline = tmp_path_factory.mktemp("pipeline") / "pipeline.yaml"
        pipeline.write_text(yaml.safe_dump(PIPELINE))
        cluster = Cluster({"AWS_EC2_METADATA_DISABLED": "true"})
        try:
            cluster.start()
            yield Live(cluster, client, environment, pipeline)
        finally:
            cluster.end()


@pytest.fixture(scope="module")
def undisturbed(live: Live) -> tuple[str, dict[int, tuple[float, float]]]:
    """What the pipeline's job says when nothing disturbs it, and its losses."""
    ended = live.genatt(*live.submission(UNDISTURBED))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    losses = live.losses(UNDISTURBED)
    assert max(losses) == LAST_STEP
    return ended.stdout, losses


@pytest.fixture
def largest_difference(live: Live, undisturbed: tuple[str, dict[int, tuple[float, float]]]) -> Callable[[str], float]:
    """Between the losses of a run and those of the undisturbed one, which have to be of the same steps."""

    def compare(run: str) -> float:
        ours, theirs = live.losses(run), undisturbed[1]
        assert ours.keys() == theirs.keys()
        return max(abs(one - other) for step in ours for one, other in zip(ours[step], theirs[step], strict=True))

    return compare
