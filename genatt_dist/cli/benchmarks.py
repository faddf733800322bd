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


@bench.command(
    "scaling",
    epilog=examples(
        "genatt bench scaling --out benchmarks/results/scaling.json",
        "genatt bench scaling --quick --steps 50 --launcher deepspeed --trace traces --out scaling.json",
    ),
)
def bench_scaling(
    out: Annotated[Path, typer.Option(help="JSON file to write; its figures go beside it as PNGs.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of these options; options given here win.")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas; default 1,2.")] = "",
    steps: Annotated[str, typer.Option(help="T, with commas; default 1,10,50,200. Dot product is beside them.")] = "",
    items: Annotated[
        str, typer.Option(help="Catalogues under the sampled softmax; default 10000,100000,1000000.")
    ] = "",
    full_items: Annotated[
        str, typer.Option(help="Catalogues under the full softmax, or none; default 10000,30000.")
    ] = "",
    few_steps: Annotated[
        str, typer.Option(help="T under the full softmax, and from a million items on; default 50.")
    ] = "",
    tables: Annotated[str, typer.Option(help="replicated,sharded, or one of them.")] = "",
    mode: Annotated[str, typer.Option(help="weak,strong, or one of them.")] = "",
    select: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=A,B", help="Cells to measure, e.g. loss=full; repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a rank; default 64.")] = None,
    launcher: Annotated[str, typer.Option(help="torchrun, deepspeed, or ray (inside a Ray job).")] = "",
    start_seconds: Annotated[
        float | None, typer.Option(min=1, help="Until launcher=ray has room for the ranks; default 300.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of every row; default 5.")] = None,
    turn_seconds: Annotated[float | None, typer.Option(min=0.01, help="Length of a turn; default 0.3.")] = None,
    row_seconds: Annotated[float | None, typer.Option(min=1, help="A row's time limit; default 120.")] = None,
    memory_mb: Annotated[
        int | None, typer.Option(min=1, metavar="MIB", help="Memory of a rank; default: most that is free.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid of small batches.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Directory for a chrome trace of every row.")] = None,
    again: Annotated[
        Path | None, typer.Option(help="Results whose rows are judged and drawn again; nothing is measured.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Results whose cost model is held against all rows; none is fitted to them.")
    ] = None,
) -> None:
    """Weak and strong scaling of the training step over ranks, T and catalogue; a cost model held against it."""
    from benchmarks.scaling import run
    from benchmarks.scaling.grid import QUICK, read

    words = {"ranks": ranks, "steps": steps, "items": items, "full_items": full_items, "few_steps": few_steps}
    words |= {"tables": tables, "mode": mode, "launcher": launcher}
    others: dict[str, object] = {
        "batch": batch,
        "start_seconds": start_seconds,
        "rounds": rounds,
        "turn_seconds": turn_seconds,
        "row_seconds": row_seconds,
    }
    others |= {"memory_mb": memory_mb, "select": select or None}
    given: dict[str, object] = {name: value for name, value in words.items() if value}
    given |= {name: value for name, value in others.items() if value is not None}
    if again is None:
        run.run(read(config, (QUICK if quick else {}) | given), out, trace, stderr(), model)
        return
    if given or quick or config or trace:
        raise typer.BadParameter(f"--again {again} measures nothing: with it go --model and --out alone")
    run.again(again, out, stderr(), model)
