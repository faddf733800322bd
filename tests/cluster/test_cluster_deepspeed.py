"""cluster/deepspeed: what the deepspeed launcher reads."""

from pathlib import Path

from cluster_files import CLUSTER, fill


def test_the_hostfile_is_one_deepspeed_reads(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text(fill((CLUSTER / "deepspeed" / "hostfile").read_text()))
    assert dict(fetch_hostfile(str(path))) == {"host-1": 8, "host-2": 8}


def test_every_line_of_deepspeed_env_is_a_variable() -> None:
    """DeepSpeed splits each line at its `=`: a comment or an empty line ends it with a traceback."""
    for line in (CLUSTER / "deepspeed" / "deepspeed_env").read_text().splitlines():
        key, value = line.split("=", maxsplit=1)
        assert key.isupper()
        assert value
        assert not any(word in key for word in ("SECRET", "TOKEN", "PASSWORD", "ACCESS_KEY"))
