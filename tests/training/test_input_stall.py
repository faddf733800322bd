"""A run says which share of its time it waited for batches."""

import json
from pathlib import Path


def test_every_train_record_has_the_share_of_waiting(trained_run: Path) -> None:
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    shares = [record["input_stall"] for record in records if record["kind"] == "train"]
    assert shares
    assert all(0 <= share < 1 for share in shares)
