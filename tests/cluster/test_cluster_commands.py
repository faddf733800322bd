"""What READMEs and docs/cluster.md tell a reader to type and to fill in is real."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from cluster_files import CLUSTER, KINDS, PLACEHOLDER, ROOT, fill, project

from genatt_dist import cli
from genatt_dist import config as configuration
from jobs import options

PAGES = [CLUSTER / "README.md", *(CLUSTER / kind / "README.md" for kind in KINDS), ROOT / "docs" / "cluster.md"]


def commands(page: Path) -> list[str]:
    """The lines of a page's ```sh blocks, continued lines joined, without prompts, comments and what is printed."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words_of(program: str) -> list[list[str]]:
    """The arguments of every call of a program in the pages, each once, placeholders filled in."""
    lines = {fill(line): None for page in PAGES for line in commands(page)}
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words[0] == program]


def parse(command: Any, words: list[str]) -> dict[str, Any]:
    """What the program would make of these arguments, without doing it: its parameters. Raises click's UsageError."""
    name = words[0]
    while hasattr(command, "commands"):
        name, words = words[0], words[1:]
        assert name in command.commands, name
        command = command.commands[name]
    return dict(command.make_context(name, list(words)).params)


@pytest.mark.parametrize("words", words_of("genatt"), ids=" ".join)
def test_genatt_takes_every_command(words: list[str]) -> None:
    asked = parse(typer.main.get_command(cli.app), words)
    if words[0] == "train":
        configuration.load(asked["config"], asked["overrides"] or [])
    if words[0] == "submit" and asked["config"]:
        options.load(asked["job"], Path(asked["config"]), asked["overrides"] or [], asked["run"])


@pytest.mark.parametrize("words", words_of("ray"), ids=" ".join)
def test_ray_takes_every_command(words: list[str]) -> None:
    from ray.scripts.scripts import cli as ray

    parse(ray, words)


@pytest.mark.parametrize("words", [words for words in words_of("python") if words[0] == "-m"], ids=" ".join)
def test_modules_that_are_run_exist(words: list[str]) -> None:
    assert find_spec(words[1])


def test_the_pages_have_commands() -> None:
    for page in PAGES[1:]:
        assert commands(page), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    """Links, and paths of this checkout in commands."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = [word for line in commands(page) for word in shlex.split(line, comments=True) if "/" in word]
    ours = [word for word in paths if re.match(r"(cluster|configs|packaging)/[\w./-]+$", word)]
    assert [path for path in ours if not (ROOT / path).exists()] == []


def listed(page: Path) -> set[str]:
    """Placeholders in the table under "What to edit" or "What to fill in"."""
    (section,) = re.findall(
        r"^## What to (?:edit|fill in)\n(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return {
        name
        for line in section.splitlines()
        if line.startswith("| `<")
        for name in PLACEHOLDER.findall(line.split("|")[1])
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_placeholder_is_listed_under_what_to_edit(kind: str) -> None:
    files = [path for path in (CLUSTER / kind).iterdir() if path.name != "README.md"]
    used = {name for path in files for name in PLACEHOLDER.findall(path.read_text())}
    page = CLUSTER / kind / "README.md"
    commands_use = {name for line in commands(page) for name in PLACEHOLDER.findall(line)}
    assert listed(page) == used | commands_use


def test_every_placeholder_of_the_guide_is_listed() -> None:
    page = PAGES[-1]
    assert listed(page) == {name for line in commands(page) for name in PLACEHOLDER.findall(line)}


def test_every_template_is_named_in_its_readme() -> None:
    for kind in KINDS:
        text = (CLUSTER / kind / "README.md").read_text()
        for path in (CLUSTER / kind).iterdir():
            assert path.name == "README.md" or path.name in text, path
        assert f"({kind}/README.md)" in (CLUSTER / "README.md").read_text()


def test_images_carry_the_version_of_pyproject() -> None:
    files = [path for path in [*CLUSTER.rglob("*"), PAGES[-1]] if path.is_file()]
    tags = {tag for path in files for tag in re.findall(r"genatt-dist:([\w.]+)-(?:cpu|cuda)", path.read_text())}
    assert tags == {project()["version"]}


def test_templates_hold_no_account_and_no_address() -> None:
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"\b\d{12}\b|AKIA[A-Z0-9]{16}|ami-[0-9a-f]{8}", text), path
            addresses = set(re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text))
            assert addresses <= {"127.0.0.1", "169.254.169.254"}, (
                path
            )  # the second: AWS' metadata server, on every machine
