"""Plans of whole clusters: what must add up, what must fit, what is advised, what is refused."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.plan.cost import Link
from genatt_dist.plan.draw import draw
from genatt_dist.plan.hardware import hardware
from genatt_dist.plan.run import Cluster, Plan, plan
from genatt_dist.training.engine import reduce_bucket

CLUSTER_1024 = Cluster.of(128, 8, "h100")


def _config(**sections: Any) -> RunConfig:
    return configuration.parse({"data": {"path": "unused", "max_len": 20}} | sections, "test")


@pytest.fixture(scope="module")
def large() -> Plan:
    config = _config(
        table={"kind": "sharded"}, loss={"kind": "sampled"}, training={"batch_sequences": 32_768, "precision": "bf16"}
    )
    return plan(config, CLUSTER_1024, items=300_000_000)


def _part(found: Plan, name: str) -> int:
    return sum(part.bytes for part in found.memory.parts if part.name == name and part.phase in ("always", "step"))


def test_1024_ranks_hold_every_row_once(large: Plan) -> None:
    rows = sorted((shard.first, shard.first + shard.rows) for shard in large.shards)
    assert len(rows) == 1024
    assert rows[0][0] == 0
    assert rows[-1][1] == 300_000_001
    assert all(before[1] == after[0] for before, after in itertools.pairwise(rows))


def test_the_fullest_rank_has_its_rows_and_their_optimizer_exactly(large: Plan) -> None:
    most = max(shard.rows for shard in large.shards)
    assert _part(large, "table rows") == pytest.approx(most * 64 * 4, abs=64)
    assert _part(large, "table optimizer") == pytest.approx(most * 4, abs=64)
    assert large.fits
    assert not large.changes


def test_the_drawing_shows_every_rank_and_needs_nothing_else(large: Plan) -> None:
    page = draw(large)
    assert len(re.findall(r"<title>rank \d+: item rows", page)) == 1024
    assert page.count(">node ") == 128
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "A model" in page
    for drawing in re.findall("<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_json_holds_what_the_verdict_rests_on(large: Plan) -> None:
    told = json.loads(json.dumps(large.as_json()))
    device = [part for part in told["memory"]["parts"] if part["place"] == "device"]
    always = sum(part["bytes"] for part in device if part["phase"] == "always")
    phases = {part["phase"] for part in device} - {"always"}
    largest = max(sum(part["bytes"] for part in device if part["phase"] == phase) for phase in phases)
    assert told["memory"]["peak"] == always + largest
    assert told["step"]["seconds"] == pytest.approx(sum(told["step"]["parts"].values()))
    assert told["fits"] is True


def test_what_does_not_fit_is_told_what_would() -> None:
    found = plan(_config(training={"batch_sequences": 512}), Cluster.of(1, 4, "l4"), items=30_000_000)
    assert not found.fits
    sizes = [change.bytes for change in found.changes]
    assert sizes == sorted(sizes, reverse=True)
    assert found.changes[-1].fits
    assert any("table.kind=sharded" in change.override for change in found.changes)


def test_where_nothing_helps_enough_every_change_is_still_told() -> None:
    cluster = Cluster.of(1, 1, "h100", gib=0.5)  # less than a CUDA context
    config = _config(data={"path": "unused", "max_len": 400}, training={"batch_sequences": 64}, loss={"kind": "bce"})
    found = plan(config, cluster, items=1000)
    assert not found.fits
    assert "data.max_len=200" in [change.override for change in found.changes]


def test_a_bucket_of_gradients_is_no_larger_than_the_model() -> None:
    found = plan(_config(), Cluster.of(1, 2, "h100"), items=1000)
    assert _part(found, "reduce bucket") == 4 * found.sizes.total
    assert reduce_bucket(10**12) == 500_000_000
    assert reduce_bucket(0) == 1


def test_zero_stages_take_less_on_more_ranks() -> None:
    def taken(stage: int, nodes: int) -> int:
        config = _config(training={"batch_sequences": 64, "zero_stage": stage}, loss={"kind": "bce"})
        return plan(config, Cluster.of(nodes, 8, "cpu"), items=1_000_000).memory.training("host")

    assert taken(1, 1) < taken(0, 1)
    assert taken(1, 4) < taken(1, 1)


def test_the_number_of_items_and_lengths_come_from_the_manifest(prepared: Path) -> None:
    config = configuration.parse({"data": {"path": str(prepared), "max_len": 20}}, "test")
    config = config.model_copy(update={"training": config.training.model_copy(update={"batch_sequences": 64})})
    found = plan(config, Cluster.of(1, 2, "cpu"))
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert found.load.num_items == manifest["num_items"]
    assert found.load.positions <= 20


@pytest.mark.parametrize(
    ("sections", "cluster", "items", "said"),
    [
        ({}, (1, 1, "h101"), 100, "use one of h100"),
        ({}, (1, 1, "cpu"), None, "--items"),
        ({}, (1, 1, "h100", 0.0), 100, "--memory 0"),
        ({"training": {"batch_sequences": 8}}, (2, 8, "h100"), 100, "at least 16"),
        ({"table": {"kind": "sharded"}, "loss": {"kind": "bce"}}, (8, 8, "h100"), 30, "too few"),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(
    sections: dict[str, Any], cluster: tuple[Any, ...], items: int | None, said: str
) -> None:
    with pytest.raises(GenattError, match=said) as caught:
        plan(_config(**sections), Cluster.of(*cluster), items=items)
    assert "\n" not in str(caught.value)


def test_collectives_cost_nothing_alone_and_less_inside_a_node() -> None:
    machine = hardware("h100")
    assert Link(machine, 1, 8).all_reduce(1e9) == 0
    assert Link(machine, 8, 8).all_reduce(1e9) < Link(machine, 16, 8).all_reduce(1e9)
    assert Link(machine, 8, 8).all_gather(1e9) == pytest.approx(Link(machine, 8, 8).all_reduce(1e9) / 2)


def test_importing_the_verb_needs_no_torch() -> None:
    code = "import sys, genatt_dist.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
