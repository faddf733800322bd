"""What an evaluation leaves beside the run says the same thing everywhere."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from category_data import add_genres
from tiny_data import NUM_ITEMS, histories

from data_pipeline.errors import GenattError
from data_pipeline.format import manifest_hash
from genatt_dist.evaluation.metrics import CUTOFFS
from genatt_dist.evaluation.run import evaluate_run


@pytest.mark.parametrize("split", ["valid", "test"])
def test_files_are_consistent_with_the_metrics(split: str, trained_run: Path) -> None:
    report = evaluate_run(trained_run, split)
    assert json.loads((trained_run / f"evaluation-{split}.json").read_text()) == report
    ranks = pl.read_parquet(trained_run / f"ranks-{split}.parquet")
    assert sorted(ranks["user_id"].to_list()) == [100 + i for i, items in enumerate(histories()) if len(items) >= 3]
    assert report["users"] == ranks.height
    rank = ranks["rank"].to_numpy()
    for k in CUTOFFS:
        assert report["metrics"][f"recall@{k}"] == pytest.approx((rank <= k).mean())
        assert report["metrics"][f"ndcg@{k}"] == pytest.approx(((rank <= k) / np.log2(1 + rank)).mean())
    assert report["metrics"]["mrr"] == pytest.approx((1 / rank).mean())
    assert report["protocol"]["ranking"] == "full catalogue"
    assert report["protocol"]["k_core"] == "users >= 1, items >= 1"
    assert report["protocol"]["categories"] == "none"
    assert "no CC, F and ILD" in report["notes"][0]


def test_the_best_checkpoint_ranks_as_it_did_while_training(trained_run: Path) -> None:
    summary = json.loads((trained_run / "summary.json").read_text())["valid"]
    found = evaluate_run(trained_run, "valid")["metrics"]
    assert found == pytest.approx(summary, rel=1e-5)


def test_an_evaluation_of_some_categories_has_files_of_its_own(
    trained_run: Path, prepared: Path, tmp_path: Path
) -> None:
    """A run on data with genres: here the run of plain data, told that its data have them."""
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    add_genres(data, NUM_ITEMS)
    run = relabelled(trained_run, prepared, data, tmp_path / "run")
    whole = evaluate_run(run, "test")
    assert whole["notes"] == []
    assert whole["protocol"]["categories"] == "5 of genres"
    report = evaluate_run(run, "test", only=["Sci-Fi/Space", "War"])
    name = "test,category=Sci-Fi_Space,category=War"
    assert json.loads((run / f"evaluation-{name}.json").read_text()) == report
    assert 0 < report["users"] == pl.read_parquet(run / f"ranks-{name}.parquet").height < whole["users"]
    assert report["protocol"]["only"] == "category=Sci-Fi/Space, category=War"
    assert json.loads((run / "evaluation-test.json").read_text()) == whole


def relabelled(run: Path, before: Path, data: Path, to: Path) -> Path:
    """A copy of the run whose checkpoints and configuration say that it was trained on `data`."""
    shutil.copytree(run, to)
    old, new = manifest_hash(str(before)), manifest_hash(str(data))
    for folder in (to / "checkpoints").iterdir():
        changed = {}
        for file in folder.glob("*.json"):
            content = file.read_text()
            if old in content:
                file.write_text(content.replace(old, new))
                changed[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        complete = json.loads((folder / "COMPLETE").read_text())
        (folder / "COMPLETE").write_text(json.dumps(complete | changed))
    config = to / "config.yaml"
    config.write_text(config.read_text().replace(str(before), str(data)))
    return to


def test_other_data_than_it_was_trained_on_is_refused(trained_run: Path, prepared: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained_run, run)
    shutil.copytree(prepared, data)
    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "tiny"', '"name": "other"'))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(prepared), str(data)))
    with pytest.raises(GenattError, match=r"was trained on data with manifest \w{12}….*now has"):
        evaluate_run(run, "test")


def test_a_damaged_checkpoint_is_named(trained_run: Path, tmp_path: Path) -> None:
    for name in ("dense.safetensors", "progress.json", "COMPLETE"):
        run = tmp_path / name
        shutil.copytree(trained_run, run)
        for file in run.glob(f"checkpoints/step-*/{name}"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)
        with pytest.raises(GenattError, match=rf"checkpoint .*{name}.*remove this checkpoint"):
            evaluate_run(run, "test")
