"""Control groups: their parent folders as the kernel names them, and their files."""

import os
from pathlib import Path

import pytest

from rewards.sandbox import cgroup
from rewards.sandbox.cgroup import Cgroup


def test_version_1_is_below_our_own(tmp_path: Path) -> None:
    memberships = "9:name=systemd:/\n8:pids:/\n4:memory:/judges/7\n0::/\n"
    mounts = f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\ncgroup {tmp_path}/pids cgroup rw,pids 0 0\n"
    assert cgroup._parents(memberships, mounts) == {
        "memory": tmp_path / "memory/judges/7",
        "pids": tmp_path / "pids",
    }


def test_version_2_is_beside_our_own_where_both_controllers_are_handed_on(tmp_path: Path) -> None:
    (tmp_path / "user.slice").mkdir()
    mounts = f"cgroup2 {tmp_path} cgroup2 rw,nosuid 0 0\n"
    handed_on = tmp_path / "user.slice/cgroup.subtree_control"
    handed_on.write_text("memory pids\n")
    assert cgroup._parents("0::/user.slice/judge.service\n", mounts) == dict.fromkeys(
        ("memory", "pids"), tmp_path / "user.slice"
    )
    handed_on.write_text("cpu pids\n")
    assert cgroup._parents("0::/user.slice/judge.service\n", mounts) == {}
    assert cgroup._parents("0::/\n", mounts) == {}  # a container's root, which has no parent


def test_version_2_speaks_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder that looks like the file system: the files the kernel puts into a new group are there."""
    folders: list[Path] = []
    mkdir_of_path = Path.mkdir

    def mkdir(path: Path) -> None:
        mkdir_of_path(path)
        folders.append(path)
        for name in ("memory.max", "memory.swap.max", "pids.max", "cgroup.procs"):
            (path / name).touch()
        (path / "memory.events").write_text("low 0\nmax 3\noom 0\noom_kill 0\n")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    group = Cgroup(dict.fromkeys(("memory", "pids"), tmp_path), memory_bytes=1 << 20, processes=5)
    group.add(77)
    [folder] = folders
    contents = {
        name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max", "cgroup.procs")
    }
    assert contents == {"memory.max": "1048576", "memory.swap.max": "0", "pids.max": "5", "cgroup.procs": "77"}
    assert not group.ran_out
    (folder / "memory.events").write_text("oom 1\noom_kill 1\n")
    assert group.ran_out
    (folder / "memory.events").write_text("oom 0\noom_kill 1\n")
    with pytest.raises(RuntimeError, match="out of memory"):
        _ = group.ran_out


@pytest.mark.parametrize("full", ["memory.max_usage_in_bytes", "memory.memsw.max_usage_in_bytes"])
def test_version_1_tells_its_own_limit_from_the_machine_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    mkdir_of_path = Path.mkdir

    def mkdir(path: Path) -> None:
        mkdir_of_path(path)
        (path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
        for name in ("memory.max_usage_in_bytes", "memory.memsw.max_usage_in_bytes"):
            (path / name).write_text(f"{50 << 20}\n")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    parents = {name: tmp_path / name for name in ("memory", "pids")}
    for parent in parents.values():
        mkdir_of_path(parent)
    group = Cgroup(parents, memory_bytes=64 << 20, processes=5)
    with pytest.raises(RuntimeError, match="out of memory"):
        _ = group.ran_out
    [folder] = parents["memory"].iterdir()
    (folder / full).write_text(f"{64 << 20}\n")
    assert group.ran_out


def test_a_group_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    with pytest.raises(FileNotFoundError):
        Cgroup({name: tmp_path / name for name in ("memory", "pids")}, memory_bytes=1 << 20, processes=5)
    assert not list((tmp_path / "memory").iterdir())


def test_groups_of_the_dead_are_cleared_away() -> None:
    folders = cgroup.parents()
    if folders is None:
        pytest.skip("no control group can be made here")
    dead, alive = (folders["memory"] / f"alignyard-{pid}-test" for pid in (2**22 + 1, os.getpid()))
    for group in (dead, alive):
        group.mkdir()
    try:
        cgroup.parents()
        assert (dead.exists(), alive.exists()) == (False, True)
    finally:
        alive.rmdir()
