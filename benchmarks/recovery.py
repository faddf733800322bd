"""How near each attention comes to the exact predictor of a known law, and how well D-GenAtt samples its own target.

    python -m benchmarks.recovery --out benchmarks/results/recovery.json

The law (copy_law.py) hides from each sequence how far back it copies from; the Bayes predictor's loss on the same
held-out sequences is the floor (MATH §7.8). Models see every training sequence once, so nothing can be learnt by heart.
One process and plain AdamW train the product's own dense model, loss, rates and noise. A stochastic model's held-out
loss is −log of the mean over M samples of p(y | sample).

Beside it stands what MATH §7.5 asks: the total variation between two sampled maps over that between two maps of the
target law, for S steps of the sampler at η = 1. 1 is a faithful law; S = 1 has nearly none by construction.

Legend: B sequences, M items of each, N real tokens, n positions, D width.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.copy_law import CopyLaw
from benchmarks.drawn_maps import places, variation
from benchmarks.interventions import latent_of_the_prior, states_of_another_user
from genatt_dist import config as configuration
from genatt_dist.attention.noise import NoiseKey, Purpose, derive
from genatt_dist.config import DiffusionAttention, RunConfig
from genatt_dist.data.batches import Batch
from genatt_dist.loss.full import full_nll
from genatt_dist.loss.objective import Candidates
from genatt_dist.model.context import Context, identity
from genatt_dist.model.diagnostics import statistics
from genatt_dist.model.jagged import Jagged
from genatt_dist.training.schedule import gamma_factor, rate_factor
from genatt_dist.training.step import DenseModel, Scale, training_noise

LAW = CopyLaw()
POSITIONS = 16  # n: the posterior over k is settled by then
STEPS = 1500
HELD_OUT = 512
SAMPLES = 64  # M of the held-out loss
FEW_HELD_OUT, FEW_SAMPLES = 128, 16  # where the loss takes T denoiser calls, or is only compared with itself

# What was tuned, once and for all types, on V-GenAtt: learning rate, batch, initial rows. No dropout: data never ends.
SETTINGS: dict[str, Any] = {
    "data": {"path": "none", "max_len": POSITIONS},
    "model": {"dropout": 0.0},
    "table": {"init_std": 0.1},
    "training": {"batch_sequences": 64, "learning_rate": 5e-3, "warmup": 0.05, "final_rate": 0.01},
}

# As configured by default, but: `latent` gives the decoder z alone, so that nothing passes z by; `faithful` is ρ = 0,
# which leaves the denoiser to L_gen.
ATTENTIONS: dict[str, dict[str, Any]] = {
    "dot_product": {"type": "dot_product"},
    "positional": {"type": "positional"},
    "variational-factor": {"type": "variational"},
    "variational-matrix": {"type": "variational", "form": "matrix"},
    "variational-latent": {"type": "variational", "decoder_input": "latent"},
    "diffusion-factor": {"type": "diffusion"},
    "diffusion-matrix": {"type": "diffusion", "form": "matrix"},
    "diffusion-factor-faithful": {"type": "diffusion", "rec_mix": 0.0},
    "diffusion-matrix-faithful": {"type": "diffusion", "form": "matrix", "rec_mix": 0.0},
}

# Seeds of sequences: training draws one for each step, held-out sequences come from far beyond them.
_HELD_OUT_SEED, _SEEDS_OF_A_RUN = 1 << 40, 1 << 20


def settings(attention: dict[str, Any], seed: int = 0) -> RunConfig:
    """The run that trains `attention`."""
    tree = SETTINGS | {
        "model": {**SETTINGS["model"], "attention": attention},
        "training": {**SETTINGS["training"], "seed": seed},
    }
    return configuration.parse(tree, "benchmarks.recovery")


def held_out(count: int = HELD_OUT) -> Tensor:
    """Sequences that no training sees: int64 [B, n + 1]."""
    return LAW.draw(count, POSITIONS + 1, _HELD_OUT_SEED)


def batch(items_BM: Tensor, first: int = 0) -> Batch:
    """Sequences of equal length as a global batch, all next items as targets; window ids count from `first`."""
    count, length = items_BM.shape
    tokens = count * (length - 1)
    layout = Jagged.of(torch.full((count,), length - 1), length - 1, tokens)
    return Batch(items_BM.flatten(), layout, first + torch.arange(count), None, tokens, tokens, count)


def train(config: RunConfig, steps: int = STEPS) -> DenseModel:
    """A model trained on fresh sequences of the law, in evaluation mode."""
    torch.manual_seed(config.training.seed)
    model, training = DenseModel(config, LAW.num_items).train(), config.training
    generative = config.model.generative
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, betas=(0.9, training.beta2), weight_decay=training.weight_decay
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * rate_factor(training, step, steps)
        items_BM = LAW.draw(training.batch_sequences, POSITIONS + 1, training.seed * _SEEDS_OF_A_RUN + step)
        one = batch(items_BM, step * training.batch_sequences)
        noise = training_noise(one, training.seed, step, config)
        losses = model(one, Candidates(one.items_M), noise, None, Scale(one.num_tokens, one.num_targets), identity)
        loss = losses.recommendation
        if generative is not None:
            loss = loss + generative.gamma * gamma_factor(generative.gamma_warmup, step, steps) * losses.generative
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def given(model: DenseModel, items_BM: Tensor, sample: int = 0, first: int = 0) -> tuple[Tensor, Context]:
    """Item rows of the positions, and the context of their `sample`-th draw."""
    one = batch(items_BM, first)
    assert model.items is not None
    root = int(derive(0, int(Purpose.REQUEST)))
    noise = NoiseKey.make(root, sample, one.window_B, one.layout.row_N, one.layout.position_N)
    return model.items(one.items_M[one.input_index_N]), Context.whole(one.layout, noise)


@torch.no_grad()
def nll(model: DenseModel, items_BM: Tensor, samples: int) -> Tensor:
    """−log 1/M Σ p(x_m | x_<m, sample) of every item but the first: float32 [B, M − 1]."""
    assert model.items is not None
    parts = []
    for first, part_BM in zip(range(0, len(items_BM), 128), items_BM.split(128), strict=True):
        draws = []
        for sample in range(samples):
            rows_ND, context = given(model, part_BM, sample, first)
            states_ND = model.backbone(rows_ND, context, sample=True).states_ND
            draws.append(full_nll(states_ND, model.items.weight[1:], part_BM[:, 1:].flatten() - 1, len(states_ND)))
        parts.append(math.log(samples) - torch.stack(draws).neg().logsumexp(0))
    return torch.cat(parts).view(len(items_BM), -1)


def mean_and_error(x_BM: Tensor) -> tuple[float, float]:
    """Mean over sequences and its standard error: positions of one sequence are not independent, sequences are."""
    by_sequence_B = x_BM.double().mean(1)
    return float(by_sequence_B.mean()), float(by_sequence_B.std() / math.sqrt(len(by_sequence_B)))


def inferring(model: DenseModel, **changes: Any) -> DenseModel:
    """A copy of the model whose maps are inferred otherwise: `changes` are fields of its attention's configuration."""
    model = copy.deepcopy(model)
    for block in model.backbone.blocks:
        attention: Any = block.attention
        attention.config = attention.config.model_copy(update=changes)
    return model


def law_ratios(
    model: DenseModel, items_BM: Tensor, sampling_steps: Sequence[int], draws: int
) -> dict[int, list[float]]:
    """For each S, at η = 1: total variation of D-GenAtt's samples over that of its target law, one number a block."""
    ratios: dict[int, list[float]] = {steps: [] for steps in sampling_steps}
    for place in places(model.backbone, *given(model, items_BM)):
        target = variation(place.target_maps(draws), place)
        for steps, row in ratios.items():
            row.append(variation(place.maps(draws, sampling_steps=steps, eta=1.0), place) / target)
    return ratios


def measure(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one model and say how near it came: a row of the result file."""
    torch.set_num_threads(1)
    config = settings(ATTENTIONS[name], seed)
    started = time.process_time()
    model = train(config, steps)
    seconds = time.process_time() - started
    items_BM = held_out()
    floor_BM, generative = LAW.bayes_nll(items_BM), config.model.generative
    samples = SAMPLES if generative is not None else 1
    loss_BM = nll(model, items_BM, samples)
    row: dict[str, Any] = {"attention": name, "seed": seed, "steps": steps, "training_cpu_seconds": round(seconds, 1)}
    row |= {"nll": mean_and_error(loss_BM)[0], "floor": mean_and_error(floor_BM)[0], "samples": samples}
    row["gap"] = mean_and_error(loss_BM - floor_BM)
    observed = statistics(model.backbone, *given(model, items_BM))
    for kept in ("active_units", "kl_mean", "total_variation", "between_users", "kappa"):
        blocks = [total / count for key, (total, count) in observed.items() if key.startswith(f"{kept}/")]
        if blocks:
            row[kept] = [float(value.mean()) for value in blocks]
    few_BM = items_BM[:FEW_HELD_OUT]
    if generative is not None:
        own_BM = nll(model, few_BM, FEW_SAMPLES)
        with states_of_another_user(model.backbone, POSITIONS):
            row["increase_by_another_users_states"] = mean_and_error(nll(model, few_BM, FEW_SAMPLES) - own_BM)
        with latent_of_the_prior(model.backbone):
            row["increase_by_the_priors_latent"] = mean_and_error(nll(model, few_BM, FEW_SAMPLES) - own_BM)
    if isinstance(generative, DiffusionAttention):
        last = generative.diffusion_steps
        ancestral_BM = nll(inferring(model, sampling_steps=last, eta=1.0), few_BM, FEW_SAMPLES)
        row["ancestral_gap"] = mean_and_error(ancestral_BM - LAW.bayes_nll(few_BM))
        ratios = law_ratios(model, few_BM, (1, 4, 10, last), draws=8)
        row["sampled_over_target_variation"] = {str(steps): values for steps, values in ratios.items()}
    return _rounded(row)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    """Train every attention with every seed and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--workers", type=int, default=1, help="models at a time, one thread each")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    result = {
        "command": f"python -m benchmarks.recovery --seeds {arguments.seeds} --steps {arguments.steps} --out FILE",
        "legend": "gap, ancestral_gap and increase_by_…: mean in nat and its standard error over held-out sequences; "
        "lists without that: one number a block; sampled_over_target_variation: by number of steps S, at eta = 1",
        "law": dataclasses.asdict(LAW),
        "positions": POSITIONS,
        "held_out_sequences": [HELD_OUT, FEW_HELD_OUT],
        "samples": [SAMPLES, FEW_SAMPLES],
        "settings": SETTINGS,
        "attentions": ATTENTIONS,
        "workers": arguments.workers,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed, arguments.steps) for seed in range(arguments.seeds) for name in arguments.attentions]
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(measure, *zip(*jobs, strict=True)):
            rows.append(row)
            Console(stderr=True).print(row)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")  # what is done is kept


if __name__ == "__main__":
    main()
