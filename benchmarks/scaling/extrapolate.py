"""From the ranks that were measured to clusters that were not: a model, and marked as one wherever it appears.

Only the counts are those of the measured rows: what a rank computes and what ranks exchange. Nothing of this machine's
times goes in, neither α and β nor waiting: what one of each costs on a GPU and its network are the constants of
`genatt_dist/plan/hardware.py`, data sheets and assumptions that nothing here was measured against. The errors of the
fitted model are therefore not those of this one.
"""

from __future__ import annotations

from typing import Any

from benchmarks.scaling.features import work
from benchmarks.scaling.grid import Spec
from genatt_dist.plan.cost import cost
from genatt_dist.plan.hardware import hardware

MARK = "MODEL, not measured"
GPU, PER_NODE = "h100", 8
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCH = 1024  # sequences of a GPU
ITEMS = 1_000_000
_ATTENTIONS: tuple[dict[str, Any], ...] = ({}, {"attention": "diffusion", "steps": 50})


def extrapolated(max_len: int, width: int) -> dict[str, Any]:
    """Weak scaling under the sampled softmax: a row for each attention, table and number of GPUs."""
    machine = hardware(GPU)
    rows = []
    for attention in _ATTENTIONS:
        for table in ("replicated", "sharded"):
            first = None
            for ranks in (1, *RANKS):
                spec = Spec(
                    **attention,
                    items=ITEMS,
                    table=table,
                    batch=BATCH * ranks,
                    ranks=ranks,
                    max_len=max_len,
                    width=width,
                )
                one = work(spec, "cuda")
                local = min(PER_NODE, ranks)
                spent = cost(spec.config, machine, one.sizes, one.trace, one.share, one.ids, ranks, local)
                first = first or spent.total
                if ranks in RANKS:
                    rows.append(
                        {
                            **spec.model_dump(),
                            "mark": MARK,
                            "ms_per_step": float(f"{1e3 * spent.total:.4g}"),
                            "tokens_per_second": float(f"{spent.tokens / spent.total:.4g}"),
                            "weak_efficiency": float(f"{first / spent.total:.4g}"),
                            "parts_ms": {name: float(f"{1e3 * each:.4g}") for name, each in spent.seconds.items()},
                        }
                    )
    return {
        "mark": MARK,
        "what": f"weak scaling on {GPU}, {PER_NODE} a node, {BATCH} sequences a GPU, over one GPU; no overlap, no wait",
        "constants": machine.source,
        "rows": rows,
    }
