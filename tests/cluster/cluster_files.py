"""What the tests of cluster/ share: the files, their placeholders, and the programs that check them."""

import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KINDS = ("docker", "ray", "kuberay", "slurm", "deepspeed")
PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_]*>")
# What the placeholders stand for in checks that look at values.
FILLED = {"<REGISTRY>": "registry.example.com/team", "<SPOT_LABEL>": "example.com/spot", "<SPOT_VALUE>": "true"}


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def pin(name: str) -> str:
    """The version that pyproject.toml pins of a requirement."""
    (found,) = (line.split("==")[1] for line in project()["dependencies"] if re.split(r"[\[=]", line)[0] == name)
    return str(found)


def fill(text: str, **values: str) -> str:
    """The text with its placeholders filled in; a name in small letters where no value is given."""
    known = FILLED | {f"<{name}>": value for name, value in values.items()}
    return PLACEHOLDER.sub(lambda found: known.get(found[0], found[0][1:-1].lower().replace("_", "-")), text)


def documents(path: str, **values: str) -> list[dict[str, Any]]:
    """The documents of a YAML file below cluster/, filled in."""
    return list(yaml.safe_load_all(fill((CLUSTER / path).read_text(), **values)))


def program(name: str) -> str:
    """A linter that the `dev` extra installs, beside this interpreter or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: run `make setup`"
    return found
