"""What the steps were promised to cost, and what they do: judged from the rows, printed, and kept beside them.

All on two threads of a CPU, max_len 50, width 64, replicated table of 12,101 items; the bounds are the project's own
and say nothing of other machines and other catalogues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUM_ITEMS = 12_101
_MACHINE = {"device": "cpu", "threads": 2}
_TRAINING = {"mode": "training", "max_len": 50, "batch": 256, "blocks": 2}
_SERVING = {"mode": "serving", "max_len": 50, "batch": 1024, "lengths": "all_n", "softmax": True}
_ONE_STEP = {"attention": "diffusion", "form": "factor", "sampler": "one_step"}
_DDIM = {"attention": "diffusion", "form": "factor", "sampler": "ddim"}


@dataclass(frozen=True)
class Target:
    """what: in words. wanted: fields of the row it speaks of. bound: of its ratio to the dot product, or where `over`
    names another row, of their times.
    """

    what: str
    wanted: Mapping[str, Any]
    bound: float
    over: Mapping[str, Any] | None = None


def _training_targets() -> list[Target]:
    found = []
    for lengths, name in (("all_n", "all lengths n"), ("beauty", "Beauty's lengths")):
        for softmax, bound in ((True, 1.15), (False, 1.6)):
            base = _TRAINING | {"lengths": lengths, "softmax": softmax}
            how = f"{name}, {'with' if softmax else 'without'} the softmax"
            found.append(Target(f"D-GenAtt one_step T=50, {how}", base | _ONE_STEP | {"steps": 50}, bound))
            if softmax:
                last, first = base | _ONE_STEP | {"steps": 200}, base | _ONE_STEP | {"steps": 1}
                found.append(Target(f"D-GenAtt one_step T=200 over T=1, {how}", last, 1.03, over=first))
                wanted = base | {"attention": "variational", "form": "factor"}
                found.append(Target(f"V-GenAtt, {how}", wanted, 1.10))
    return found


TARGETS = [
    *_training_targets(),
    *(
        Target(
            f"serving, {blocks} block{'s' if blocks > 1 else ''}, sample_blocks={place}, S={steps}",
            _SERVING | _DDIM | {"blocks": blocks, "sample_blocks": place, "steps": steps},
            bound,
        )
        for blocks, place, steps, bound in (
            (1, "all", 4, 1.6),
            (1, "all", 50, 2.5),
            (2, "last", 4, 1.4),
            (2, "last", 50, 1.8),
        )
    ),
]


def judge(rows: Sequence[Mapping[str, Any]], num_items: int = _NUM_ITEMS) -> list[dict[str, Any]]:
    """Each target whose rows were measured with enough repeats and where it was promised: what, bound, measured, met.

    num_items: V of the rows, which do not say it.
    """
    found: list[dict[str, Any]] = []
    if num_items != _NUM_ITEMS:
        return found
    for target in TARGETS:
        row, over = _find(rows, target.wanted), _find(rows, target.over) if target.over else None
        if row is None or (target.over and over is None):
            continue
        measured = row["ms_per_step"] / over["ms_per_step"] if over else row["ratio_to_dot_product"]
        if measured is not None:
            found.append(
                {
                    "what": target.what,
                    "bound": target.bound,
                    "measured": round(measured, 3),
                    "met": measured <= target.bound,
                }
            )
    return found


def _find(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
    fields = {"status": "ok", **_MACHINE, **wanted}
    return next((row for row in rows if all(row[name] == value for name, value in fields.items())), None)
