"""cluster/docker: Dockerfiles that a linter passes, with pyproject.toml's versions; the watch for preemption."""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cluster_files import CLUSTER, ROOT, pin, program, project

DOCKER = CLUSTER / "docker"
FILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, lines joined, comments dropped."""
    text = "\n".join(line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(first, rest) for first, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


@pytest.mark.parametrize("name", FILES)
def test_a_dockerfile_passes_the_linter(name: str, tmp_path: Path) -> None:
    def lint(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program("hadolint"), "--no-color", path], capture_output=True, text=True, check=False)

    found = lint(DOCKER / name)
    assert (found.returncode, found.stdout) == (0, "")
    broken = tmp_path / "Dockerfile"
    broken.write_text((DOCKER / name).read_text().replace("WORKDIR /app", "WORKDIRR /app"))
    assert lint(broken).returncode == 1


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_pyproject(name: str) -> None:
    runs = " ".join(rest for instruction, rest in instructions(name) if instruction == "RUN")
    assert not re.search(r"[=~<>]=\d", runs)
    (expression,) = re.findall(r"sed -n '([^']+)' pyproject.toml", runs)
    torch = subprocess.run(
        ["sed", "-n", expression, ROOT / "pyproject.toml"], capture_output=True, text=True, check=True
    ).stdout
    assert torch.split() == [f"torch=={pin('torch')}"]
    (extras,) = (rest.removeprefix("EXTRAS=") for kind, rest in instructions(name) if rest.startswith("EXTRAS="))
    assert extras in project()["optional-dependencies"]
    (base,) = (rest for instruction, rest in instructions(name) if instruction == "FROM")
    assert re.fullmatch(r"python:3\.1[12]-slim-\w+", base)  # a public image, as requires-python allows


@pytest.mark.parametrize("name", FILES)
def test_nothing_runs_as_root_and_signals_arrive(name: str) -> None:
    found = instructions(name)
    users = [rest for instruction, rest in found if instruction == "USER"]
    assert users == ["1000"]
    assert ("ENTRYPOINT", '["tini", "-g", "--"]') in found
    packages = next(rest for instruction, rest in found if instruction == "RUN").split()
    assert {"tini", "wget", "curl"} <= set(packages)  # wget: KubeRay's probes
    assert packages[-1] == ">/etc/profile.d/genatt.sh"  # `ray up` uses login shells


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path of the checkout out: patterns are of the root unless they begin with **/."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    parts = path.split("/")
    leading = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        fnmatch(part, pattern[3:]) if pattern.startswith("**/") else fnmatch(whole, pattern)
        for pattern in patterns
        for part, whole in zip(parts, leading, strict=True)
    )


def test_images_hold_the_program_and_no_data() -> None:
    for name in FILES:
        for instruction, rest in instructions(name):
            if instruction == "COPY":
                sources = [word for word in rest.split()[:-1] if not word.startswith("--")]
                for source in sources:
                    assert (ROOT / source).exists(), source
                    assert not ignored(source), source
    needed = ("genatt_dist/data/batches.py", "jobs/pipeline.py", "configs/quickstart.yaml", "cluster/resume-flag")
    assert [path for path in (*needed, "benchmarks/beauty_lengths.json") if ignored(path)] == []
    kept_out = (
        ".git/config",
        ".venv/bin/python",
        "runs/a/config.yaml",
        "shards/x",
        "data/u.data",
        ".env",
        "a/b.parquet",
    )
    assert [path for path in (*kept_out, "genatt_dist/__pycache__/x.pyc", ".deepspeed_env") if not ignored(path)] == []


class Metadata(BaseHTTPRequestHandler):
    """A cloud's metadata server that gives notice at the second question."""

    asked: list[str]

    def do_PUT(self) -> None:
        self._answer("token")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "spot/instance-action" in self.path:
            assert self.headers["X-aws-ec2-metadata-token"] == "token"
            self._answer('{"action": "terminate"}' if len(self.asked) > 1 else None)
        else:
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer("TRUE" if len(self.asked) > 1 else "FALSE")

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[ThreadingHTTPServer]:
    handler = type("Asked", (Metadata,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 110), ("gcp", 25)])
def test_a_notice_of_preemption_drains_the_node(
    cloud: str, seconds: int, metadata: ThreadingHTTPServer, tmp_path: Path
) -> None:
    log, ray = tmp_path / "log", tmp_path / "ray"
    ray.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >{log}\n')
    ray.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "METADATA_URL": f"http://127.0.0.1:{metadata.server_address[1]}",
        "WATCH_SECONDS": "0.1",
    }
    subprocess.run(["bash", DOCKER / "watch-preemption", cloud], env=environment, check=True, timeout=30)
    words = log.read_text().splitlines()
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert words[-2:] == ["--deadline-remaining-seconds", str(seconds)]


def test_ray_has_the_command_that_drains_a_node() -> None:
    """It is hidden from Ray's help, so a new version might change it."""
    from ray.scripts.scripts import cli

    options = {option for parameter in cli.commands["drain-node"].params for option in parameter.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options
