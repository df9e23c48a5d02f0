"""The run folder: what is written where, so that a crash at any instant leaves the last good state
loadable.

This file knows folders, files and signals. It does not know what the tensors in them mean.

    runs/<name>/run.json                    settings, versions, fingerprints
                metrics.jsonl               one line a step
                checkpoints/step-000080/    complete, with MANIFEST.json (sha256 of each), or absent
                .lock                       held by the process that writes here
"""

import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "MANIFEST.json"
# How a network file system says that it does not lock files, or write folders through.
NOT_DONE_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class RunError(ValueError):
    """A run folder that cannot be used as asked: it exists, is locked, not writable, or was made
    with other settings."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Ask the disk itself to hold a file's bytes or a folder's list of names: a rename alone
    promises neither."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if not path.is_dir() or e.errno not in NOT_DONE_HERE:
            raise
        note_once(
            f"this file system does not write folders through ({e.strerror}): a power cut may lose "
            "the newest checkpoint"
        )
    finally:
        os.close(fd)


@functools.cache
def note_once(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def remove_debris(folder: Path) -> None:
    """Remove what a crash left half-written."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder; on success it appears, whole, as `target`; on failure nothing does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            fsync(path)
        fsync(temporary)
        os.rename(temporary, target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yield a folder; on success its files replace their namesakes in `folder`, each at once."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-files-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            fsync(path)
            os.replace(path, folder / path.name)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """The old text or the new one, never a part."""
    with replaced_files(path.parent) as temporary:
        # a name that is not UTF-8 must not cost the scores that stand beside it
        (temporary / path.name).write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_writable(folder: Path) -> None:
    """Raise RunError if `folder` could not be made. Writes nothing."""
    if re.search("[\ud800-\udfff]", str(folder)):
        raise RunError(
            f"{folder}: no path that is not UTF-8 can be read back; choose another --out"
        )
    nearest = folder
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
    except OSError as e:  # a name too long, links in a circle
        raise RunError(f"{folder} cannot be made ({e.strerror}); choose another --out") from None
    if not nearest.is_dir():
        raise RunError(f"{nearest} is a file, so {folder} cannot be made; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"{nearest} is not writable; choose another --out")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One writer a folder. The system drops the lock when its process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                raise RunError(
                    f"{folder} is in use by another process; wait for it, or choose another --out"
                ) from None
            if e.errno not in NOT_DONE_HERE:
                raise
            note_once(
                f"{folder}: this file system has no locks ({e.strerror}): nothing keeps a second "
                "process from writing there"
            )
        yield


# --- checkpoints ----------------------------------------------------------------------------------


@contextmanager
def new_checkpoint(run: Path, step: int, keep: int = 2) -> Iterator[Path]:
    """Yield a folder to fill for checkpoints/step-<step>; afterwards drop all but the newest `keep`
    checkpoints."""
    target = run / "checkpoints" / f"step-{step:06}"
    with new_folder(target) as folder:
        yield folder
        manifest = {p.name: sha256(p) for p in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for old in checkpoints(run)[keep:]:
        discard(old)


def discard(path: Path) -> None:
    """Delete a file or folder, its name first: half of a checkpoint must never look like one."""
    doomed = path.with_name(f".tmp-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed) if doomed.is_dir() and not doomed.is_symlink() else doomed.unlink()


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, newest first."""
    return sorted(
        (run / "checkpoints").glob("step-*"), key=lambda p: (len(p.name), p.name), reverse=True
    )


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except (ValueError, AttributeError, TypeError, RecursionError) as e:
        return f"{MANIFEST} is not readable ({e})"
    return None


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint whose files are as written, what was wrong with the newer ones)."""
    complaints = []
    for folder in checkpoints(run):
        problem = damage(folder)
        if problem is None:
            return folder, complaints
        complaints.append(f"{folder}: {problem}")
    return None, complaints


# --- metrics --------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl, a line an event, cut back to `step` on opening: rows after the checkpoint will
    be made again."""

    def __init__(self, path: Path, step: int = 0):
        kept = []
        if step and path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, **row) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Rows must be on the disk before a checkpoint that stands for them is."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")  # a line cut short by a crash


# --- signals --------------------------------------------------------------------------------------


class Stopped(Exception):
    """Raised between two steps once the state is saved. code: 128 + the signal's number: 130 after
    Ctrl-C, 143 after a polite kill."""

    def __init__(self, code: int):
        self.code = code


came_before: list[int] = []  # exit codes of signals that came before stop_signals listened


@contextmanager
def stop_signals(alone: bool = True) -> Iterator[list[int]]:
    """Yield a list that is empty until a signal asks to stop, then holds the exit code, 128 + its
    number. The same signal again ends at once; another one is another way to ask: a dropped ssh
    brings SIGHUP and SIGTERM, Slurm's warning is SIGUSR1, and SIGTERM follows.

    The first time, stderr says what will happen, since a step or a validation can take a minute.

    alone: False under torchrun, which hands on to its processes what they have already got.
    A signal of came_before was to end the program, but was swallowed: it stops at the first step.
    """
    received = list(came_before)

    def note(number, frame):
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if alone and 128 + number in received:
            tell(f"{name} again: ended at once, nothing more was saved")
            os._exit(128 + number)
        if alone:
            end = f"{name} again ends at once and saves nothing"
            tell(f"{name}: stops when this step, validation or batch is done; {end}")
        received.append(128 + number)

    def tell(text: str) -> None:  # not print, which may be what the signal interrupted
        with suppress(OSError):  # a terminal that is gone
            os.write(2, f"\n{text}\n".encode())

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # as nohup wants it
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread, which alone may listen
            break
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
