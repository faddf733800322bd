"""The throughput benchmark runs from end to end and says what it compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.reference.plain_sasrec import PlainSasrec, PlainTraining
from genatt_dist.data.sequences import Sequences

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_benchmark_writes_a_row_for_each_kept_round(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    arguments = [
        "--shards",
        str(prepared),
        "--rounds",
        "2",
        "--out",
        str(out),
        "data.max_len=8",
        "model.hidden_size=16",
    ]
    subprocess.run([sys.executable, "-m", "benchmarks.throughput", *arguments], cwd=ROOT, check=True, timeout=240)
    result = json.loads(out.read_text())
    assert [row["round"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        quotient = row["ours_sequences_per_second"] / row["plain_sequences_per_second"]
        assert row["ratio"] == pytest.approx(quotient, abs=1e-3)
    assert "data.max_len=8" in result["command"]


def test_reference_trains_on_every_real_target(prepared: Path) -> None:
    """An opponent that saw fewer targets, or did not learn, would be no opponent."""
    sequences = Sequences.read(str(prepared))
    torch.manual_seed(0)
    training = PlainTraining(sequences, 50, PlainSasrec(sequences.num_items, 50, 16, 1, 1, 0.0), batch_sequences=16)
    lengths = sequences.history_end("train") - sequences.offsets[:-1]
    assert training.num_targets == sum(max(0, int(length) - 1) for length in lengths)
    first = training.epoch(0)
    for epoch in range(1, 60):
        last = training.epoch(epoch)
    assert last < 0.8 * first
