"""The one place that speaks to DeepSpeed: process group, engine, and its optimizer state by parameter name.

DeepSpeed owns the dense module and nothing else. Loss shares are scaled by the world size outside, because DeepSpeed
(as TorchRec) averages gradients over the ranks.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.errors import GenattError
from genatt_dist.config import TrainingConfig

_TIMEOUT_SECONDS = 600.0
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOST_REDUCED = 500_000_000  # DeepSpeed's default


def select_device() -> torch.device:
    """This rank's device: its GPU where there is one, else the CPU. DS_ACCELERATOR decides where a launcher set it."""
    if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def init_process_group(device: torch.device, seconds: float = _TIMEOUT_SECONDS) -> None:
    """Join the other ranks (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the launcher).

    seconds: after which a collective fails by itself, if nothing else (training/watchdog.py) has ended it before.
    Raises GenattError when they do not come.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Our watchdog says which rank is lost and ends with 75; NCCL's own thread would abort the process before that.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    import deepspeed
    from deepspeed.utils import logger

    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in the GRU too
    # Errors only: under ZeRO-3 it warns of modules that take or give a dataclass. Gradients there equal plain PyTorch's
    # (tests/distributed), because each parameter is used inside the module that owns it.
    logger.setLevel(logging.ERROR)
    # The shared-memory all-reduce would be compiled on first use: a compiler and a wait that nothing here needs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=seconds)
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        rank, world_size, host, port = (
            os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        )
        raise GenattError(
            f"rank {rank} does not find the other {world_size} ranks at {host}:{port} "
            f"({' '.join(str(error).split())[:200]}): see whether all of them were started, and reach that address"
        ) from None


class Engine:
    """A DeepSpeed engine around the dense module."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        import deepspeed

        parameters = sum(parameter.numel() for parameter in module.parameters())
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=_optimizer(module, config),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": config.accumulation_steps,
                # Written out although it is off: DeepSpeed 0.19 clips at 1.0 where it is absent.
                "gradient_clipping": config.gradient_clipping,
                "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": reduce_bucket(parameters)},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": config.precision == "bf16"},
                "steps_per_print": 1_000_000_000,
            },
        )

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed would divide by the accumulation steps; our loss is already divided by the tokens of all of them.
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Update the dense parameters (at the last of `accumulation_steps` calls)."""
        self._engine.step()

    def set_learning_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @contextmanager
    def gathered(self, write: bool = False) -> Iterator[None]:
        """Whole parameters on every rank inside (ZeRO-3 holds parts). Collective.

        write: what rank 0 makes of them is kept.
        """
        import deepspeed

        with deepspeed.zero.GatheredParameters(
            list(self.module.parameters()),
            modifier_rank=0 if write else None,
            enabled=self._engine.zero_optimization_stage() == 3,
        ):
            yield

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters and buffers by their names in `state`."""
        shapes = {f"parameter.{name}": tuple(_full_shape(value)) for name, value in self.module.named_parameters()}
        return shapes | {f"buffer.{name}": tuple(value.shape) for name, value in self.module.named_buffers()}

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """fp32 parameters, buffers and optimizer moments by name, whole, copied to the CPU. Collective.

        keep: False for a rank that only helps the others; it gets nothing, and holds one whole tensor at a time.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        kept: dict[str, Tensor] = {}

        def take(name: str, value: Tensor) -> None:
            if keep:
                kept[name] = value.detach().to("cpu", copy=True).contiguous()

        for name, value in self.module.named_buffers():
            take(f"buffer.{name}", value)
        if with_moments := self._has_moments():
            self._link_moments()
        partitioned = self._engine.zero_optimization_stage() > 0
        for name, parameter in self.module.named_parameters():
            shape = _full_shape(parameter)
            take(f"parameter.{name}", safe_get_full_fp32_param(parameter).view(shape) if partitioned else parameter)
            if partitioned:
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS if with_moments}
            else:
                moments = {key: value for key, value in self._base.state.get(parameter, {}).items() if key in _MOMENTS}
            for key, moment in moments.items():
                take(f"{key}.{name}", moment.view(shape))
        return kept

    def load_state(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take what `state` gave, at any world size and ZeRO stage; `step` is the number of updates behind it.
        Collective.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        stage = self._engine.zero_optimization_stage()
        with_moments = any(name.startswith(_MOMENTS[0]) for name in tensors)
        if with_moments:
            self._prime(step)
        # What the forward pass reads. ZeRO-3 would take it from the fp32 parts only in its next step.
        with torch.no_grad(), self.gathered(write=True):
            for name, value in (*self.module.named_parameters(), *self.module.named_buffers()):
                kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
                value.copy_(tensors[f"{kind}.{name}"])
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                moments = {key: tensors[f"{key}.{name}"].to(self._engine.device) for key in _MOMENTS if with_moments}
                if stage == 0:
                    for key, moment in moments.items():
                        self._base.state[parameter][key].copy_(moment)
                    continue
                whole = tensors[f"parameter.{name}"].to(self._engine.device)
                if stage == 3:
                    safe_set_local_fp32_param(parameter, _part(parameter, whole))
                    for key, moment in moments.items():
                        safe_set_local_optimizer_state(parameter, _part(parameter, moment), key)
                    continue
                safe_set_full_fp32_param(parameter, whole)
                for key, moment in moments.items():
                    safe_set_full_optimizer_state(parameter, moment, key)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The torch optimizer under ZeRO's wrapper."""
        base: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return base

    def _flat_parameters(self) -> list[Tensor]:
        """The fp32 tensors that the torch optimizer updates: parameters, or this rank's flat parts of them."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        return [parameter for group in self._base.param_groups for parameter in group["params"]]

    def _has_moments(self) -> bool:
        return any(_MOMENTS[0] in self._base.state.get(flat, {}) for flat in self._flat_parameters())

    def _prime(self, step: int) -> None:
        """Make the moments that torch's optimizer would make in its first step, so that they can be filled."""
        for flat in self._flat_parameters():
            self._base.state[flat] = {"step": torch.tensor(float(step), device=flat.device)} | {
                key: torch.zeros_like(flat) for key in _MOMENTS
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Make the moments known by parameter under ZeRO-1 and -2.

        DeepSpeed 0.19 does so once, after the first step of the first parameter group, when other groups have none yet.
        """
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()


def reduce_bucket(parameters: int) -> int:
    """Numbers that ZeRO reduces at a time in a model of so many. DeepSpeed allocates the bucket whole, so that its
    default takes 1.9 GiB of any model; no model fills more than it has.
    """
    return min(_MOST_REDUCED, max(1, parameters))


def _optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Weight decay reaches matrices only: not tables, biases, norms or scalars."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        table = "items" in name or "position" in name or name.startswith("features.")
        matrix = parameter.ndim > 1 and not table and not name.endswith(".bias")
        (decayed if matrix and config.weight_decay else rest).append(parameter)
    groups = [{"params": rest, "weight_decay": 0.0}]
    if decayed:
        groups.append({"params": decayed, "weight_decay": config.weight_decay})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), eps=1e-8, fused=True)


def _part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """What ZeRO-3 keeps on this rank of a tensor as large as the parameter: equal parts, the last ones padded.

    DeepSpeed 0.19 sets whole tensors of a parameter only where its size is a multiple of the number of ranks.
    """
    size: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    padded = nn.functional.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape before ZeRO-3 took the parameter apart."""
    return getattr(parameter, "ds_shape", parameter.shape)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without a gradient."""
    value = value.detach().clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value
