"""What `genatt bench` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genatt_dist.cli.app import bench, examples, stderr


@bench.command(
    "steps",
    epilog=examples(
        "genatt bench steps --out benchmarks/results/steps_cpu.json",
        "genatt bench steps --quick --select mode=training --select form=factor --out steps.json",
    ),
)
def bench_steps(
    out: Annotated[Path, typer.Option(help="JSON file to write; its figures go beside it as a PNG.")],
    quick: Annotated[bool, typer.Option("--quick", help="A small grid of small batches.")] = False,
    select: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=A,B", help="Rows to measure, e.g. max_len=50; repeatable.")
    ] = None,
    steps: Annotated[str, typer.Option(help="T of training, with commas; default 1 to 200.")] = "",
    sampling_steps: Annotated[str, typer.Option(help="S of serving, with commas; default 1 to 200.")] = "",
    max_len: Annotated[str, typer.Option(help="n, with commas; default 50,100,200.")] = "",
    training_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a batch at n=50, fewer at longer n; default 256.")
    ] = None,
    serving_batch: Annotated[
        int | None, typer.Option(min=1, help="Users of a batch at n=50, fewer at longer n; default 1024.")
    ] = None,
    items: Annotated[int, typer.Option(min=10, help="Items of the catalogue.")] = 12_101,
    rounds: Annotated[int, typer.Option(min=5, help="Timings of a row.")] = 5,
    variant_seconds: Annotated[float, typer.Option(min=0, help="Seconds the timings of one row may take.")] = 10.0,
    memory_limit: Annotated[
        int | None, typer.Option(min=1, metavar="MIB", help="Memory a row may take; default: most that is free.")
    ] = None,
) -> None:
    """Time, latency and memory of generated attention against its diffusion steps, beside dot product."""
    from benchmarks.steps.run import run

    extents = {"steps": steps, "sampling_steps": sampling_steps, "max_lens": max_len}
    batches = {"training_batch": training_batch, "serving_batch": serving_batch}
    careful = {"num_items": items, "rounds": rounds, "variant_seconds": variant_seconds, "memory_mb": memory_limit}
    run(out, quick, select or [], extents, batches, careful, stderr())
