"""Stands in for an arm's process: `python -m fake_arm OUT ARM` does what OUT's behaviour.json says of the arm."""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    out, name = Path(sys.argv[1]), sys.argv[2]
    doing = json.loads((out / "behaviour.json").read_text()).get(name, "finish")
    with (out / "started.jsonl").open("a") as file:
        print(json.dumps({"arm": name, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}), file=file)
    if doing == "hang":
        time.sleep(60)
    if doing == "meet":  # two that must run at one time: each waits for the other's sign
        (out / f"{name}.here").touch()
        deadline = time.monotonic() + 20
        while len(list(out.glob("*.here"))) < 2:
            if time.monotonic() > deadline:
                sys.exit("error: alone")
            time.sleep(0.01)
    if doing == "fail":
        sys.exit("error: no room for it")
    (out / name).mkdir(exist_ok=True)
    (out / name / "evaluation-test.json").write_text("{}")


if __name__ == "__main__":
    main()
