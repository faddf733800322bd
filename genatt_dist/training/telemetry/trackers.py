"""Servers that keep the curves of many runs: MLflow and Weights & Biases, each used where its variable is set.

MLFLOW_TRACKING_URI asks for MLflow, WANDB_PROJECT for W&B (WANDB_MODE=offline then keeps everything in the run
directory); all else about them is up to their own variables. The id that a server gave a run is kept in the run's
tracking.json, so that a resumed run goes on in the same curves. Neither server can take a point back: a resumed run
does not send again what lies before the last update that the server knows.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from data_pipeline.errors import GenattError
from genatt_dist.training.telemetry.writers import Values, Writer, histograms, scalars
from genatt_dist.training.warnings import FailureSign

_IDS = "tracking.json"
_WANDB_START_SECONDS, _WANDB_END_SECONDS = 60, 10


def trackers(run: Path) -> dict[str, Callable[[], Writer]]:
    """What makes each server's writer, by name; of those that are asked for.

    Raises GenattError where one's client is not installed.
    """
    found: dict[str, Callable[[], Writer]] = {}
    if os.environ.get("MLFLOW_TRACKING_URI"):
        # The client's own limits are minutes a request. It reads these once, when it is imported.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        mlflow = _client("mlflow", "MLFLOW_TRACKING_URI")
        found["MLflow"] = lambda: Mlflow(mlflow, run)
    if os.environ.get("WANDB_PROJECT"):
        wandb = _client("wandb", "WANDB_PROJECT")
        found["W&B"] = lambda: WeightsAndBiases(wandb, run)
    return found


class Mlflow:
    """A run on an MLflow server, the configuration beside it as config.json."""

    def __init__(self, mlflow: Any, run: Path) -> None:
        self._mlflow, known = mlflow, _ids(run).get("mlflow")
        self._last = -1
        if known is None:
            started = mlflow.start_run(run_name=run.name)
            _keep(run, "mlflow", started.info.run_id)
        else:
            mlflow.start_run(run_id=known)
            history = mlflow.MlflowClient().get_metric_history(known, "train/loss")
            self._last = max((point.step for point in history), default=-1)
        mlflow.log_dict(_config(run), "config.json")

    def record(self, kind: str, step: int, values: Values) -> None:
        if step >= self._last:  # the sign @ is refused
            named = {name.replace("@", "_at_"): value for name, value in scalars(kind, values).items()}
            self._mlflow.log_metrics(named, step=step)

    def warn(self, step: int, sign: FailureSign) -> None:
        self._mlflow.set_tag(f"warning.{sign.name}", f"step {step}: {sign.text}")

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    """A run of a W&B project, with the configuration; offline, a directory of the run that `wandb sync` takes."""

    def __init__(self, wandb: Any, run: Path) -> None:
        known = _ids(run).get("wandb")
        if known is None:
            _keep(run, "wandb", known := secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ["WANDB_PROJECT"],
            id=known,
            name=run.name,
            resume="allow",
            dir=str(run),
            config=_config(run),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_WANDB_START_SECONDS,
                finish_timeout=_WANDB_END_SECONDS,  # without it, its process holds ours until the network is back
                finish_timeout_raises=True,
            ),
        )
        self._next = self._run.step  # 0 for a run that is new to the server

    def record(self, kind: str, step: int, values: Values) -> None:
        if step >= self._next:
            drawn = {name: self._wandb.Histogram(numbers) for name, numbers in histograms(kind, values).items()}
            self._run.log(scalars(kind, values) | drawn, step=step)

    def warn(self, step: int, sign: FailureSign) -> None:
        self._run.summary[f"warning/{sign.name}"] = f"step {step}: {sign.text}"

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _client(name: str, variable: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise GenattError(
            f"{variable} is set but {name} is not installed: pip install 'genatt-dist[{name}]', or unset it"
        ) from None


def _config(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text())


def _ids(run: Path) -> dict[str, str]:
    """The servers' ids of this run, as far as it has any."""
    path = run / _IDS
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _keep(run: Path, server: str, known: str) -> None:
    temporary = run / f".{_IDS}.{server}"
    temporary.write_text(json.dumps(_ids(run) | {server: known}))
    temporary.rename(run / _IDS)
