"""cluster/slurm and cluster/resume-flag: sound shell, options that sbatch has, and the way through a preemption, with
programs in place of Slurm's that do what its manual says.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster_files import CLUSTER, ROOT, program

SCRIPT = CLUSTER / "slurm" / "train.sbatch"
# Long options of sbatch(1), Slurm 22.05, that a script may hold.
SBATCH = frozenset(Path(__file__).with_name("sbatch_options.txt").read_text().split())
# Slurm's and our programs: each writes what it was asked into a log. `srun` runs what the test gives it.
FAKES = {
    "srun": 'echo "srun $*" >>"$LOG"; bash -c "$STEP"',
    "scontrol": 'echo "scontrol $*" >>"$LOG"',
    "scancel": 'echo "scancel $*" >>"$LOG"; kill -TERM "$(cat "$RUN.pid")"',
    "genatt": 'echo "genatt $*" >>"$LOG"; echo "$CHECKPOINTS" >&2; [ -z "$CHECKPOINTS" ]',
}


def test_scripts_are_sound_shell() -> None:
    scripts = [SCRIPT, CLUSTER / "resume-flag", CLUSTER / "docker" / "watch-preemption"]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK) or script == SCRIPT
    found = subprocess.run([program("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_sbatch_has_every_option() -> None:
    lines = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line) for line in lines]
    assert all(options), lines
    assert {option[1] for option in options if option} <= SBATCH
    assert "#SBATCH --signal=B:TERM@90" in lines
    assert "#SBATCH --requeue" in lines


class Slurm:
    """A job's surroundings in a directory of its own."""

    def __init__(self, path: Path) -> None:
        self.run, self.log = path / "run", path / "log"
        programs = path / "bin"
        programs.mkdir()
        for name, text in FAKES.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (programs / name).chmod(0o755)
        (path / ".venv").symlink_to(path)  # the script puts .venv/bin of the checkout first
        (path / "cluster").symlink_to(CLUSTER)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(path),
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "LOG": str(self.log),
            "RUN": str(self.run),
            "CHECKPOINTS": "",
        }

    def start(self, step: str, **environment: str) -> subprocess.Popen[str]:
        """The job's script, with a shell command in place of the ranks."""
        return subprocess.Popen(
            ["bash", SCRIPT, "run.yaml", self.run, "training.epochs=2"],
            env={**self.environment, "STEP": step, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_a_run_that_ends_well_is_not_run_again(slurm: Slurm) -> None:
    assert slurm.start("exit 0").wait(20) == 0
    (srun,) = slurm.asked()
    assert srun.endswith(f"genatt train run.yaml --run {slurm.run} --launcher slurm world_size=2 training.epochs=2")


@pytest.mark.parametrize(("step", "code"), [("exit 75", 75), ('touch "$RUN/stopped.json"; exit 137', 137)])
def test_a_stopped_run_goes_back_into_the_queue_and_resumes(slurm: Slurm, step: str, code: int) -> None:
    slurm.run.mkdir()
    assert slurm.start(step).wait(20) == code
    genatt, srun, scontrol = slurm.asked()
    assert genatt == f"genatt checkpoints {slurm.run}"
    assert f"genatt train run.yaml --resume --run {slurm.run}" in srun
    assert scontrol == "scontrol requeue 7"


def test_a_mistake_is_not_tried_again_even_where_an_earlier_try_was_stopped(slurm: Slurm) -> None:
    slurm.run.mkdir()
    (slurm.run / "stopped.json").touch()
    assert slurm.start("exit 2").wait(20) == 2
    assert not [line for line in slurm.asked() if line.startswith("scontrol")]


def test_restarts_end(slurm: Slurm) -> None:
    job = slurm.start("exit 75", SLURM_RESTART_COUNT="3", GENATT_MAX_RESTARTS="3")
    assert job.wait(20) == 75
    assert not [line for line in slurm.asked() if line.startswith("scontrol")]
    assert job.stdout is not None
    assert "stopped after 3 restarts" in job.stdout.read()


def test_the_signal_before_the_limit_reaches_the_ranks_and_is_waited_for(slurm: Slurm) -> None:
    step = 'echo $$ >"$RUN.pid"; trap "sleep 0.5; exit 75" TERM; while :; do sleep 0.1; done'
    job = slurm.start(step)
    limit = time.monotonic() + 20
    while not Path(f"{slurm.run}.pid").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert slurm.asked()[1:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_a_run_lost_before_its_first_checkpoint_is_moved_aside(slurm: Slurm) -> None:
    slurm.run.mkdir()
    (slurm.run / "config.yaml").touch()
    assert slurm.start("exit 0", CHECKPOINTS="error: run holds no complete checkpoint").wait(20) == 0
    assert "--resume" not in slurm.asked()[1]
    assert [path.name for path in slurm.run.parent.glob("run.lost-*/config.yaml")] == ["config.yaml"]


def test_any_other_fault_of_the_run_directory_ends_the_job(slurm: Slurm) -> None:
    slurm.run.mkdir()
    job = slurm.start("exit 0", CHECKPOINTS="error: no permission")
    assert job.wait(20) == 2
    assert slurm.run.exists()
    assert len(slurm.asked()) == 1


def test_the_words_that_resume_flag_waits_for_are_genatts() -> None:
    from data_pipeline.errors import GenattError
    from genatt_dist.training.checkpoint.store import Store
    from genatt_dist.training.options import CheckpointConfig

    with pytest.raises(GenattError, match="no complete checkpoint"):
        Store.of(ROOT / "configs", CheckpointConfig()).newest()
