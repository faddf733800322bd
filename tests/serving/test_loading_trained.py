"""A run is served by one process with the best checkpoint's weights, whatever ranks and tables wrote it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import run_config

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.table import TableShard
from genatt_dist.evaluation.run import evaluate_run
from genatt_dist.serving.trained import load
from genatt_dist.training.checkpoint import inventory, write
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.step import DenseModel


def write_run(run: Path, prepared: Path, table: str) -> tuple[DenseModel, torch.Tensor]:
    """A run directory as training leaves it, with two checkpoints of which the first is the better one."""
    loss = {"kind": "sampled" if table == "sharded" else "full"}
    config = run_config(prepared, table={"kind": table}, loss=loss, model={"attention": {"type": "diffusion"}})
    sequences = Sequences.read(str(prepared))
    run.mkdir()
    (run / "config.yaml").write_text(configuration.dump(config))
    for step in (30, 20):  # the later one first: what is left in hand is the best
        torch.manual_seed(step)
        model = DenseModel(config, sequences.num_items)
        for buffer in model.buffers():
            buffer.fill_(step / 7)
        rows = torch.randn(sequences.num_items + 1, config.model.hidden_size)
        if model.items is not None:
            model.items.weight.data = rows
        path = Store.of(run, config.training.checkpoint).path(step)
        state = {f"parameter.{name}": value.detach() for name, value in model.named_parameters()}
        state |= {f"buffer.{name}": value for name, value in model.named_buffers()}
        state |= {f"exp_avg.{name}": torch.ones_like(value) for name, value in model.named_parameters()}
        bounds = [(0, 17), (17, len(rows))] if table == "sharded" else [(0, 0)]
        for rank, (low, high) in enumerate(bounds):
            shard = TableShard("item", low, 0, rows[low:high], {"momentum1": torch.zeros(high - low)})
            write.write_part(path, rank, step, [shard] if table == "sharded" else [])
        progress = Progress(sequences.manifest_hash, step, best_step=20, best_metric=0.5)
        write.seal(path, step, len(bounds), write.Whole(state, progress, configuration.dump(config)))
    return model, rows


@pytest.mark.parametrize("table", ["replicated", "sharded"])
def test_best_weights_rows_and_buffers_are_loaded(table: str, prepared: Path, tmp_path: Path) -> None:
    model, rows = write_run(tmp_path / "run", prepared, table)
    trained = load(tmp_path / "run")
    assert trained.step == 20
    assert torch.equal(trained.table.weight.cpu(), rows)
    found = {name: value.cpu() for name, value in trained.backbone.state_dict().items()}
    expected = model.backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not trained.backbone.training
    assert trained.config.table.kind == table


def test_a_run_without_a_checkpoint_is_refused(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(configuration.dump(run_config(prepared)))
    with pytest.raises(GenattError, match="holds no complete checkpoint"):
        load(run)


def test_a_trained_run_serves_what_its_summary_says(trained_run: Path) -> None:
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    best = max((line for line in lines if line["kind"] == "valid"), key=lambda line: line["ndcg@10"])
    assert load(trained_run).step == best["step"]


def test_inference_is_chosen_when_a_run_is_loaded_and_changes_no_weight(prepared: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", prepared, "replicated")
    plain, other = load(tmp_path / "run"), load(tmp_path / "run", ["sampling_steps=7", "eta=1", "sample_blocks=last"])
    chosen = other.config.model.generative
    assert (chosen.sampling_steps, chosen.eta, chosen.sample_blocks) == (7, 1.0, "last")
    assert plain.config.model.generative.sampling_steps == 4
    states = plain.backbone.state_dict(), other.backbone.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert other.backbone.blocks[0].attention.config == chosen


def test_evaluation_with_other_inference_has_files_of_its_own(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, prepared, "replicated")
    plain = evaluate_run(run, "valid")
    other = evaluate_run(run, "valid", inference=["sampling_steps=50", "eta=1"])
    assert json.loads((run / "evaluation-valid.json").read_text()) == plain
    assert json.loads((run / "evaluation-valid,eta=1,sampling_steps=50.json").read_text()) == other
    assert (run / "ranks-valid,eta=1,sampling_steps=50.parquet").exists()
    assert other["inference"] == ["sampling_steps=50", "eta=1"]


def test_a_checkpoint_of_another_model_is_refused(prepared: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", prepared, "replicated")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("latent_size: 32", "latent_size: 31"))
    with pytest.raises(GenattError, match=r"does not fit the model of this version: \d+ tensors differ, the first is"):
        load(tmp_path / "run")


@pytest.mark.parametrize("table", ["replicated", "sharded"])
def test_exported_bundle_serves_as_its_run_does(table: str, prepared: Path, tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    write_run(run, prepared, table)
    found = inventory.checkpoints(run, verify=True, out=str(bundle))
    assert [(one.step, one.newest, one.best) for one in found.checkpoints] == [(20, False, True), (30, True, False)]
    assert (found.verified, found.bundle) == ([20, 30], {"step": 20, "out": str(bundle)})
    shutil.rmtree(run / "checkpoints")
    assert {path.name for path in bundle.iterdir()} == {
        "dense.safetensors", "config.yaml", "progress.json", "bundle.json", "COMPLETE"
    }  # fmt: skip
    facts = json.loads((bundle / "bundle.json").read_text())
    sequences = Sequences.read(str(prepared))
    assert facts["manifest_hash"] == sequences.manifest_hash
    assert facts["num_items"] == sequences.num_items
    trained, (model, rows) = load(bundle), write_run(tmp_path / "again", prepared, table)
    assert trained.step == 20
    assert torch.equal(trained.table.weight.cpu(), rows)
    expected = model.backbone.state_dict()
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in trained.backbone.state_dict().items())
    assert not any(name.startswith("exp_avg") for name in load_file(bundle / "dense.safetensors"))
    with pytest.raises(GenattError, match="exists already"):
        inventory.checkpoints(tmp_path / "again", out=str(bundle))


def test_a_step_that_is_not_there_and_a_damaged_file_are_named(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, prepared, "sharded")
    with pytest.raises(GenattError, match="no complete checkpoint of step 25: it has those of steps 20, 30"):
        inventory.checkpoints(run, step=25)
    file = run / "checkpoints" / "step-00000030" / "table-00001-00.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert inventory.checkpoints(run, verify=True, step=20).verified == [20]
    for out in (None, str(tmp_path / "bundle")):
        with pytest.raises(GenattError, match=r"step-00000030: table-00001-00\.safetensors has sha256"):
            inventory.checkpoints(run, verify=out is None, out=out, step=30)
    assert not (tmp_path / "bundle").exists()


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    write_run(run, prepared, "replicated")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr("os.fsync", full)
        with pytest.raises(
            GenattError, match=r"^cannot write .*bundle: No space left on device; choose another --export"
        ):
            inventory.checkpoints(run, out=str(bundle))
    assert not bundle.exists()
    inventory.checkpoints(run, out=str(bundle))
    with pytest.raises(GenattError, match="bundle exists already: choose another --export"):
        inventory.checkpoints(run, out=str(bundle))
    with pytest.raises(GenattError, match="bundle is an exported bundle"):
        inventory.checkpoints(bundle)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(GenattError, match="run holds no complete checkpoint"):
        inventory.checkpoints(run, verify=True)
