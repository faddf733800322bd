"""Fused and compiled code against the plain one.

    python -m benchmarks.kernels denoise --out FILE.json     the kernel against the plain sampler, on a CUDA device
    python -m benchmarks.kernels resources --out FILE.json   what the compiler makes of the kernel; needs no GPU
    python -m benchmarks.kernels compile --out FILE.json     torch.compile of the backbone against eager, on the CPU

`denoise` times by CUDA events and `compile` by the clock, both in turns within one process. The figure to quote is the
median ratio of the turns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.attention import diffusion, entries, kernels, noise, sampler
from genatt_dist.attention.base import Rows
from genatt_dist.attention.denoiser import Denoiser, Times
from genatt_dist.attention.entries import Entries, row_width
from genatt_dist.attention.noise import NoiseKey, Purpose, derive
from genatt_dist.attention.options import DiffusionAttention
from genatt_dist.config import ModelConfig
from genatt_dist.model import dropout
from genatt_dist.model.backbone import Backbone, Output
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged

MAX_LEN, HIDDEN, GENERATOR = 50, 64, 128
BUILDS = {80: "A100", 90: "H100"}
ENTRIES = (16, 64)  # K' of rank 16 with 1 and 4 heads; 50 offsets take 64 too


def context_of(lengths: list[int], device: str = "cpu", step: int = 0) -> Context:
    """A batch of sequences of these lengths."""
    lengths_B = torch.tensor(lengths, device=device)
    layout = Jagged.of(lengths_B, max(lengths), sum(lengths))
    windows_B = torch.arange(len(lengths), device=device)
    return Context.whole(layout, NoiseKey.make(0, step, windows_B, layout.row_N, layout.position_N))


# --- the denoising kernel ---------------------------------------------------------------------------------------------


def denoise(repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of the plain sampler and of the kernel, for M rows and S steps."""
    if not torch.cuda.is_available():
        raise GenattError(
            "benchmarks.kernels denoise needs a CUDA device and torch sees none: run it on a machine that has one; "
            "`resources` and `compile` run without"
        )
    for form, dtype, sequences, steps in product(
        ("factor", "matrix"), (torch.float32, torch.bfloat16), (1, 16, 256, 2048), (1, 4, 10, 50)
    ):
        row = {"form": form, "dtype": str(dtype).removeprefix("torch."), "rows": sequences * MAX_LEN, "steps": steps}
        with torch.no_grad():
            plain, fused, why = _samplers(form, dtype, sequences, steps)
            if why is not None:
                yield row | {"status": why}
                continue
            for _ in range(3):  # compiles, and fills caches
                plain(), fused()
            turns = [(_milliseconds(plain), _milliseconds(fused)) for _ in range(repeats)]
            times = [statistics.median(times) for times in zip(*turns, strict=True)]
        ratio = statistics.median(before / after for before, after in turns)
        yield row | {"status": "ok", "plain_ms": times[0], "kernel_ms": times[1], "speedup": ratio}


def _samplers(
    form: str, dtype: torch.dtype, sequences: int, steps: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor | None], str | None]:
    """The plain sampler and the kernel on the same rows, and why the latter cannot be had (None: it can)."""
    model = ModelConfig.model_validate(
        {"hidden_size": HIDDEN, "attention": {"type": "diffusion", "form": form, "generator_size": GENERATOR}}
    )
    attention = model.attention
    assert isinstance(attention, DiffusionAttention)
    rows = Rows.of(context_of([MAX_LEN] * sequences, "cuda"), last=False)
    denoiser = Denoiser(model, attention, row_width(attention, MAX_LEN)).to("cuda", dtype)
    valid, keys = Entries.of(form, attention.rank, rows), rows.noise("a benchmark")
    alpha_bar = Times(attention.schedule, attention.diffusion_steps).alpha_bar
    given_MG = torch.randn(sequences * MAX_LEN, GENERATOR, device="cuda", dtype=dtype)
    tau_TG = torch.randn(attention.diffusion_steps + 1, GENERATOR, device="cuda", dtype=dtype)
    times, eta = sampler.times(attention.diffusion_steps, steps), 1.0
    words = [int(derive(int(Purpose.SAMPLER), 0, t)) for t in times]

    def draw(t: int) -> Tensor:
        return valid.normal(keys.token(Purpose.SAMPLER, 0, t), model.num_heads, like=given_MG)

    def clean(r_MHK: Tensor, t: int) -> Tensor:
        clean_MHK: Tensor = denoiser(denoiser.input(r_MHK, onto=given_MG + tau_TG[t]), valid)
        return clean_MHK

    def plain() -> Tensor:
        return sampler.sample(clean, draw, alpha_bar, times, eta)

    def fused() -> Tensor | None:
        return kernels.sample_rows(denoiser, given_MG, tau_TG, valid, keys.token_N, words, alpha_bar, times, eta)

    why = kernels.unsupported(given_MG.device, dtype, GENERATOR, model.num_heads * valid.width)
    return plain, fused, why


def _milliseconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# --- what the compiler makes of it ------------------------------------------------------------------------------------


def compiled(plan: kernels.Plan, capability: int) -> Any:
    """The kernel compiled for a GPU that need not be there (`capability`: 80 for 8.0)."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from genatt_dist.attention.kernels.denoising import sample_kernel

    value = "*bf16" if plan.dtype is torch.bfloat16 else "*fp32"
    values = dict.fromkeys(("out", "given", "tau", "w_g", "w_2", "b_2", "w_3", "b_3"), value)
    tables = {"token": "*i64", "count": "*i64", "time": "*i32", "word": "*i64", "coefficient": "*fp32"}
    sizes = dict.fromkeys(("num_rows", "num_steps", "generator", "heads", "width", "max_width"), "i32")
    constants = {
        "ROWS": kernels.ROWS,
        "GENERATOR": plan.generator,
        "ENTRIES": plan.entries,
        "PRECISION": plan.precision,
    }
    signature = values | tables | sizes | dict.fromkeys(constants, "constexpr")
    # As at a launch: torch aligns what it allocates to 16 bytes, and d_h is a multiple of 16.
    aligned = [*range(len(values | tables)), list(signature).index("generator")]
    source = ASTSource(
        sample_kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": kernels.WARPS, "num_stages": 1}
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources() -> Iterator[dict[str, Any]]:
    """Shared memory (bytes a program), registers and spilt bytes (a thread) of every plan."""
    for capability, (dtype, precision), columns in product(
        BUILDS, ((torch.float32, "bf16x6"), (torch.float32, "tf32"), (torch.bfloat16, "tf32")), ENTRIES
    ):
        plan = kernels.Plan(dtype, GENERATOR, columns, precision)
        kernel = compiled(plan, capability)
        registers, stack = _registers(kernel.asm["cubin"])
        yield {
            "capability": capability,
            "like": BUILDS[capability],
            "dtype": str(dtype).removeprefix("torch."),
            "precision": precision if dtype is torch.float32 else "bf16",
            "entries": columns,
            "shared_bytes": kernel.metadata.shared,
            "shared_bytes_planned": plan.shared_bytes,
            "registers": registers,
            "spilt_bytes": stack,
        }


def _registers(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, from cubin by the tool in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([str(tool), "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


# --- torch.compile on the CPU -----------------------------------------------------------------------------------------


def compile_(repeats: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of the backbone in training, eager and compiled.

    The keyed noise stays eager: Dynamo 2.13 cannot follow the 64-bit arithmetic of its Python integers, and Inductor
    refuses the views it hashes in place. The row without dropout draws none: the most that compiling can give. What
    else cannot be compiled runs as it is.
    """
    draws = {name: draw for name, draw in vars(noise).items() if inspect.isfunction(draw)}
    for module, (name, draw) in product((noise, entries, diffusion, dropout), draws.items()):
        if getattr(module, name, None) is draw:
            setattr(module, name, torch.compiler.disable(draw))
    torch._dynamo.config.suppress_errors = True
    for attention, rate in (("diffusion", 0.5), ("dot_product", 0.5), ("dot_product", 0.0)):
        for pools in ((MAX_LEN,), (6, 9, 16, 30)):
            yield _compile_row(attention, rate, pools, repeats)


def _compile_row(attention: str, rate: float, pools: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """One model, 256 sequences a batch; pools: the longest sequence of each batch."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = ModelConfig.model_validate({"hidden_size": HIDDEN, "dropout": rate, "attention": {"type": attention}})
    backbone = Backbone(model, MAX_LEN)
    batches = [context_of(_lengths(longest), step=longest) for longest in pools]
    rows = [torch.randn(len(context.layout.row_N), HIDDEN) for context in batches]
    run: dict[str, Callable[..., Output]] = {"eager": backbone, "compiled": torch.compile(backbone, dynamic=True)}

    def step(kind: str, pool: int) -> float:
        backbone.zero_grad()
        started = time.perf_counter()
        output = run[kind](rows[pool], batches[pool])
        (output.states_ND.square().mean() + output.generative_loss).backward()
        return time.perf_counter() - started

    def turn() -> tuple[float, float]:
        eager, compiled = (sum(step(kind, pool) for pool in range(len(pools))) for kind in ("eager", "compiled"))
        return eager, compiled

    compiling, graphs = [], []
    for pool in range(len(pools)):  # what the first call takes beyond the second was compiling
        compiling.append(round(step("compiled", pool) - step("compiled", pool), 2))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    turn()
    turns = [turn() for _ in range(repeats)]
    return {
        "attention": attention,
        "dropout": rate,
        "tokens": [len(part) for part in rows],
        "widths": list(pools),
        "eager_ms": round(1000 * statistics.median(eager for eager, _ in turns) / len(pools), 1),
        "compiled_ms": round(1000 * statistics.median(compiled for _, compiled in turns) / len(pools), 1),
        "speedup": round(statistics.median(eager / compiled for eager, compiled in turns), 3),
        "speedups": [round(eager / compiled, 3) for eager, compiled in turns],
        "compile_seconds": compiling,
        "graphs_after_each_pool": graphs,
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }


def _lengths(longest: int) -> list[int]:
    """256 lengths up to `longest`: all of MAX_LEN, or spread over a pool of like lengths, as batches are cut."""
    return [MAX_LEN if longest == MAX_LEN else longest - index % (longest // 2) for index in range(256)]


def main() -> None:
    """Run one of the comparisons and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("denoise", "resources", "compile"))
    parser.add_argument("--repeats", type=int, default=9, help="turns that count")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        run = {"denoise": denoise, "compile": compile_, "resources": lambda repeats: resources()}[arguments.what]
        rows = []
        for row in run(arguments.repeats):
            console.print(row)
            rows.append(row)
    except GenattError as error:
        raise SystemExit(f"error: {error}") from None
    result = {
        "command": f"python -m benchmarks.kernels {arguments.what} --repeats {arguments.repeats}",
        "device": torch.cuda.get_device_name() if arguments.what == "denoise" else "none",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
