"""The doctor: each thing that can be wrong with a machine is found, and its line names what mends it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from genatt_dist import doctor
from genatt_dist.doctor import Check, GiB

HEALTHY = {
    name: {"error": None} for name in ("torch", "fbgemm_gpu", "torchrec", "deepspeed", "ray", "pyarrow")
}  # fmt: skip
HEALTHY["torch"] = {"error": None, "cuda_build": None, "gpus": []}


def torch_facts(build: str | None, gpus: list[str]) -> dict[str, dict]:
    return HEALTHY | {"torch": {"error": None, "cuda_build": build, "gpus": gpus}}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What seems to be installed: at first what pyproject.toml requires, with fbgemm's CPU build."""
    seen: dict[str, str | None] = dict(doctor.pins())
    monkeypatch.setattr(doctor, "installed_version", lambda name: seen.get(name))
    return seen


def assert_broken(check: Check, ok: bool | None, found: str, mend: str) -> None:
    assert check.ok is ok
    assert found in check.found
    assert mend in check.mend


def test_pins_are_those_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    plain = [re.sub(r"\[.*\]", "", line.partition(";")[0]) for line in lines]  # without extras and markers
    exact = dict(line.split("==") for line in plain if "==" in line)
    assert doctor.pins() == exact
    assert {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "ray", "pyarrow"} <= exact.keys()


def test_cache_directory_is_where_downloads_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.known import cache_directory

    for settings in ({}, {"XDG_CACHE_HOME": "/x"}, {"XDG_CACHE_HOME": "/x", "GENATT_CACHE": "/g"}):
        for name in ("XDG_CACHE_HOME", "GENATT_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert doctor.cache_dir() == cache_directory()


def test_importing_the_doctor_imports_no_framework() -> None:
    code = "import sys, genatt_dist.doctor; sys.exit(bool({'torch', 'ray', 'deepspeed', 'polars'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_this_environment_passes(tmp_path: Path) -> None:
    checks = doctor.examine(tmp_path / "runs")
    assert [check for check in checks if check.ok is False] == []
    assert len({check.name for check in checks}) == len(checks)
    assert not (tmp_path / "runs").exists()


def test_python_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert_broken(doctor.check_python(), False, sys.executable, "PYTHON=python3.11")


# --- packages ---------------------------------------------------------------------------------------------------------


def test_project_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "pins", dict)
    (check,) = doctor.check_packages(HEALTHY)
    assert_broken(check, False, "not installed", "make setup")


@pytest.mark.usefixtures("versions")
def test_healthy_packages_pass() -> None:
    checks = doctor.check_packages(HEALTHY)
    assert [check.name for check in checks] == ["torch", "fbgemm-gpu-cpu", "torchrec", "deepspeed", "ray", "pyarrow"]
    assert all(check.ok for check in checks)


def test_package_missing_or_of_another_version(versions: dict[str, str | None]) -> None:
    versions.update({"ray": None, "fbgemm-gpu-cpu": "1.9.0"})
    checks = {check.name: check for check in doctor.check_packages(HEALTHY)}
    assert_broken(checks["ray"], False, "not installed", "make setup")
    assert_broken(checks["fbgemm-gpu-cpu"], False, "1.9.0, but 1.8.0 is required", "make setup")
    assert checks["torch"].ok


@pytest.mark.usefixtures("versions")
def test_package_that_does_not_import() -> None:
    checks = doctor.check_packages(HEALTHY | {"torchrec": {"error": "OSError: undefined symbol"}})
    broken = next(check for check in checks if check.name == "torchrec")
    assert_broken(broken, False, "OSError: undefined symbol", "python -c 'import torchrec'")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importable modules, each broken in its own way."""
    for name, body in {
        "sound": "print('noise')",
        "raises": "raise OSError('undefined symbol: x\\nmore')",
        "exits": "raise SystemExit(3)",
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "hangs": "import time; time.sleep(60)",
    }.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("modules")
def test_import_error_does_not_hide_later_modules() -> None:
    facts = doctor._probe_chain(("raises", "exits", "sound"))
    assert facts["raises"]["error"] == "OSError: undefined symbol: x"
    assert facts["exits"]["error"] == "SystemExit: 3"
    assert facts["sound"]["error"] is None


@pytest.mark.usefixtures("modules")
def test_module_that_kills_its_process_is_named() -> None:
    facts = doctor._probe_chain(("sound", "dies", "raises"))
    assert facts["sound"]["error"] is None
    assert facts["dies"]["error"] == f"killed by signal {int(signal.SIGKILL)}"
    assert facts["raises"]["error"].startswith("not reached: importing dies")


@pytest.mark.usefixtures("modules")
def test_import_that_hangs_ends() -> None:
    assert doctor._probe_chain(("hangs",), seconds=1)["hangs"]["error"] == "not done after 1 s"


@pytest.mark.parametrize(
    ("cuda_fbgemm", "build", "gpus", "ok", "mend"),
    [
        (False, None, [], True, ""),
        (False, "13.0", [], True, ""),
        (True, "13.0", ["H100"], True, ""),
        (True, None, [], False, "DEVICE=cpu"),
        (False, "13.0", ["H100"], False, "DEVICE=cuda"),
    ],
)
def test_builds_of_torch_and_fbgemm(
    versions: dict[str, str | None], cuda_fbgemm: bool, build: str | None, gpus: list[str], ok: bool, mend: str
) -> None:
    if cuda_fbgemm:
        versions["fbgemm-gpu-cpu"] = None
    assert_broken(doctor.check_fbgemm_build(torch_facts(build, gpus)), ok, "fbgemm for", mend)


def test_builds_are_unknown_without_torch() -> None:
    facts = HEALTHY | {"torch": {"error": "ImportError"}}
    assert_broken(doctor.check_fbgemm_build(facts), False, "unknown", "make setup")
    assert doctor.check_gpu(facts, []).ok


# --- GPU and compiler -------------------------------------------------------------------------------------------------


def test_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert_broken(doctor.check_gpu(torch_facts(None, []), ["H100"]), False, "CPU build", "DEVICE=cuda")
    assert_broken(doctor.check_gpu(torch_facts("13.0", []), ["H100"]), False, "torch sees none", "driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_broken(doctor.check_gpu(torch_facts("13.0", []), ["H100"]), False, "H100", "unset CUDA_VISIBLE_DEVICES")


def test_gpus_are_counted_by_name() -> None:
    assert doctor.check_gpu(torch_facts("13.0", ["H100", "H100"]), []).found == "2 × H100 (CUDA 13.0)"


def test_driver_program_that_fails_lists_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no devices were found'; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.visible_gpus() == []


def test_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert_broken(doctor.check_compiler(), None, "no g++ and no ninja", "build-essential")


# --- processor and memory ---------------------------------------------------------------------------------------------


def test_container_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"/sys/fs/cgroup/cpu.max": "50000 100000", "/sys/fs/cgroup/memory.max": str(GiB)}
    monkeypatch.setattr("genatt_dist.launch.limits.read", limits.__getitem__)
    assert doctor.available_memory() == GiB
    assert_broken(doctor.check_cores(), None, "0.5 of", "CPU limit")
    assert_broken(doctor.check_memory(), None, "1.0 GiB", "batch_sequences")


def test_no_container_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "genatt_dist.launch.limits.read",
        {"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"}.get,
    )
    assert doctor.available_cores() >= 1
    assert doctor.available_memory() == psutil.virtual_memory().total


@pytest.mark.parametrize(("value", "ok"), [("0", False), ("many", False), ("4", None), ("2", True), (None, True)])
def test_threads(monkeypatch: pytest.MonkeyPatch, value: str | None, ok: bool | None) -> None:
    monkeypatch.setattr(doctor, "available_cores", lambda: 2.0)
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    check = doctor.check_threads()
    assert check.ok is ok
    assert bool(check.mend) == (ok is not True)


def test_shared_memory_is_small_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 100 * GiB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(16 * GiB, 0, 16 * GiB))
    assert_broken(doctor.check_shared_memory(), None, "16.0 GiB", "--shm-size=30g")
    monkeypatch.undo()
    assert_broken(doctor.check_shared_memory("/nowhere"), None, "/nowhere", "tmpfs")


def test_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in ("LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.check_allocator().ok
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert_broken(doctor.check_allocator(), None, "=131072", "unset MALLOC_TRIM_THRESHOLD_,")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert doctor.check_allocator().ok


# --- network and disk -------------------------------------------------------------------------------------------------


def test_loopback_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_loopback().ok

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert_broken(doctor.check_loopback(), False, "refused", "`lo`")


def test_host_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_output", lambda command, seconds: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "lost")
    assert_broken(doctor.check_hostname(), None, "lost", "127.0.0.1 lost")


def test_command_that_hangs_or_is_missing_gives_nothing() -> None:
    assert doctor._output(["sleep", "30"], seconds=0.2) is None
    assert doctor._output(["no-such-program"], seconds=1) is None


def test_directory_takes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert_broken(doctor.check_writable("runs", tmp_path / "a/b", 0), False, "Permission denied", "writable")


def test_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert_broken(doctor.check_writable("runs", tmp_path / "runs", 0), False, "Not a directory", "choose another")


def test_disk_is_nearly_full(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert_broken(doctor.check_writable("runs", tmp_path / "a/b", 2 * free), None, str(tmp_path), "free some space")
    assert os.listdir(tmp_path) == []


def test_no_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    assert_broken(doctor.check_temporary(), False, "No usable", "TMPDIR")


def test_table_shows_mends_and_literal_brackets() -> None:
    console = Console(record=True, width=80)
    doctor.print_table([Check("a", True, "[red]x"), Check("b", None, "y"), Check("c", False, "z", "do this")], console)
    text = console.export_text()
    for part in ("ok", "[red]x", "warn", "fail", "→ do this"):
        assert part in text
