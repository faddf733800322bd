"""Stands in for an arm's process: `python -m fake_arm OUT ARM` does what OUT's behaviour.json says of the arm."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

STEP = 4


def main() -> None:
    out, name = Path(sys.argv[1]), sys.argv[2]
    doing = json.loads((out / "behaviour.json").read_text()).get(name, "finish")
    if doing == "await":
        signal.signal(signal.SIGTERM, lambda number, _: _told_with_the_other(out, name))
    with (out / "started.jsonl").open("a") as file:
        print(json.dumps({"arm": name, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}), file=file)
    if doing == "orphan":  # a worker in a session of its own, as a launcher makes it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        (out / f"{name}.child").write_text(str(child.pid))
    if doing in ("hang", "orphan", "await"):
        time.sleep(60)
    if doing == "meet":  # two that must run at one time: each waits for the other's sign
        (out / f"{name}.here").touch()
        if not _comes(lambda: len(list(out.glob("*.here"))) >= 2):
            sys.exit("error: alone")
    if doing == "fail":
        sys.exit("error: no room for it")
    if doing == "quit":
        print("a line that gives no reason")
        sys.exit(3)
    write(out, name)


def write(out: Path, name: str) -> None:
    """What a finished arm leaves that the queue looks at."""
    run = out / name
    newest = run / "checkpoints" / f"step-{STEP:08d}"
    newest.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(json.loads((out / "configs.json").read_text())[name])
    (newest / "progress.json").write_text(json.dumps({"step": STEP, "best_step": STEP}))
    (newest / "COMPLETE").touch()
    (run / "summary.json").write_text(json.dumps({"valid": {"ndcg@10": 0.1}, "train": {"seconds": 1.0}}))
    asked = yaml.safe_load((out / "plan.yaml").read_text())["arms"][name]["also_infer"]
    others = {other: {"attention": changes} for other, changes in asked.items()}
    (run / "other-inference.json").write_text(json.dumps(others))
    (run / "evaluation-test.json").write_text(json.dumps({"step": STEP, "metrics": {"ndcg@10": 0.1}}))


def _told_with_the_other(out: Path, name: str) -> None:
    """Ends well only where the other arm is told to end too before this one has; meanwhile the queue is signalled."""
    (out / f"{name}.told").touch()
    os.kill(os.getppid(), signal.SIGTERM)
    if _comes(lambda: len(list(out.glob("*.told"))) >= 2):
        (out / f"{name}.well").touch()
    sys.exit(1)


def _comes(sign: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not sign():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    main()
