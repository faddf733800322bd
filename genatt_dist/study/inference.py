"""A trained arm under other settings than it was trained with: other noise, to match it, and other inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from genatt_dist.config import ModelConfig
from genatt_dist.evaluation.evaluate import evaluate
from genatt_dist.model.backbone import Backbone
from genatt_dist.serving.trained import Trained, load
from genatt_dist.study.paths import OTHER_INFERENCE, SPLIT, inferences_left, read_json, write_json
from genatt_dist.study.plan import Arm, with_attention


def under(trained: Trained, model: ModelConfig) -> Trained:
    """The trained weights in a model whose parameters have the same names and shapes."""
    config = trained.config.model_copy(update={"model": model})
    backbone = Backbone(model, config.data.max_len)
    backbone.load_state_dict(trained.backbone.state_dict())
    return replace(trained, config=config, backbone=backbone.to(trained.device).eval())


def evaluate_also(arm: Arm, run: Path) -> None:
    """Rank the test targets under each of the arm's other inferences; what is there already is kept."""
    path = run / OTHER_INFERENCE
    done = read_json(path) or {}
    for name, attention in inferences_left(run, arm.also_infer).items():
        trained = load(run)
        trained = under(trained, with_attention(trained.config, attention, name).model)
        of = (trained.backbone, trained.table, trained.sequences, SPLIT, trained.config, trained.device)
        done[name] = {"attention": attention, "metrics": evaluate(*of).metrics}
        write_json(path, done)
