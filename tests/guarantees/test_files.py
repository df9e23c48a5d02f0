"""Folders and files as they are elsewhere: network file systems, other users, another umask."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
from helpers import flags, interrupt, make_world, refused, run, runs, score, tree

SHORT = {"max_steps": 2, "epochs": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder, **SHORT)).code == 0
    return folder


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_where_nothing_can_be_locked_the_run_goes_on_and_says_so(
    world, tmp_path, monkeypatch, name
):
    def flock(*args):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = run(*flags(world, tmp_path / "run", **SHORT))
    assert result.code == 0
    assert "has no locks" in result.err and str(tmp_path / "run") in result.err


def test_where_folders_are_not_written_through_the_run_goes_on_and_says_so_once(
    world, tmp_path, monkeypatch
):
    fsync = os.fsync

    def strict(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    runs.note_once.cache_clear()
    monkeypatch.setattr(os, "fsync", strict)
    result = run(*flags(world, tmp_path / "run", **SHORT))
    assert result.code == 0 and result.err.count("does not write folders through") == 1


def test_a_disk_that_fails_is_still_a_failure(world, tmp_path, monkeypatch):
    def failing(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    result = run(*flags(world, tmp_path / "run", **SHORT))
    assert result.code == 1 and "Input/output error" in result.err


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_who_may_read_what_is_written_is_the_umask_s_to_say(world, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert run(*flags(world, tmp_path / "run", **SHORT)).code == 0
        assert run("--merge", tmp_path / "run", "--out", tmp_path / "merged").code == 0
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in files}
    assert set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize(
    "name, code, said",
    [
        ("model.safetensors", 3, "permission denied"),
        ("adapter_model.safetensors", 1, "Permission denied"),
        ("config.json", 3, "Permission denied"),
        ("run.json", 2, "Permission denied"),
        ("boolq.json", 3, "Permission denied"),
    ],
)
def test_another_user_s_file_is_called_that_and_not_damaged(
    world, whole, tmp_path, monkeypatch, name, code, said
):
    opened = Path.open

    def denied(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    def read(path, *args, **kwargs):
        with denied(path, "rb") as file:
            return file.read()

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: read(path).decode())
    result = score(whole, "--data", world.tests, "--out", tmp_path / "scores")
    refused(result, code, said, name)
    assert "download" not in result.err and "--overwrite" not in result.err


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(
    world, tmp_path, monkeypatch
):
    """It would be thrown away for an older one."""
    long = SHORT | {"max_steps": 9, "save_every": 2}
    assert interrupt(5, *flags(world, tmp_path / "run", **long)).code == 130
    before = tree(tmp_path / "run")

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(runs, "sha256", failing)
    result = run("--resume", tmp_path / "run")
    assert result.code == 1 and "Input/output error" in result.err
    assert tree(tmp_path / "run") == before


def test_a_file_system_without_modes_is_written_to_all_the_same(world, tmp_path, monkeypatch):
    def chmod(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", chmod)
    assert run(*flags(world, tmp_path / "run", **SHORT)).code == 0


def test_a_device_is_not_replaced_by_a_file(world, tmp_path):
    os.mkfifo(tmp_path / "device")
    result = run("--ckpt", world.base, "--trace", tmp_path / "device")
    refused(result, 2, "is not a file")
    assert stat.S_ISFIFO((tmp_path / "device").stat().st_mode)
