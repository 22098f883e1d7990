"""A work directory in a bucket (s3://, gs://), for a run on one host: it works in a folder of its own and keeps the bucket up to date.

A bucket has no renames, no appends and no locks. So rows are appended and saves are committed on a disk, as ever, and what is new goes up
every few seconds and at the end: a checkpoint's manifest after its files, so that one without a manifest does not count, there as here;
metrics before the checkpoints that they lead to. A start brings down what the bucket holds, which alone is true: what a killed run had
not sent yet is done again.

The lock is a number that only one run can write (a conditional write): ``.lock/7`` belongs to its writer until it says that it
let go, or has said nothing for ``STALE`` seconds. Who finds a higher number than its own stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from vlm_jax.data.tars import filesystem
from vlm_jax.errors import ConfigError
from vlm_jax.train.checkpoint import MANIFEST

EVERY = 10.0       # seconds between looks at what is new
STALE = 120.0      # seconds without a word after which a lock is nobody's
SERIES = ("checkpoints", "frozen", "best", "result")      # folders whose folders are checkpoints


class LostError(RuntimeError):
    """Another run has taken the work directory over."""


class Mirror:
    """``folder`` on this disk and ``address`` in a bucket, brought together by ``fetch``, ``send`` and ``close``.

    Raises ConfigError where another run holds the address.
    """

    def __init__(self, address: str, folder: pathlib.Path, say: Callable[[str], None] = lambda text: None, every: float = EVERY, stale: float = STALE):
        self.address, self.folder, self.say, self.every, self.stale = address.rstrip("/"), folder, say, every, stale
        self.store, self.root = filesystem(self.address)
        self.me, self.turn = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}", 0
        self.sent: dict[str, tuple[int, int]] = {}      # path -> (size, time of change) as it was sent
        self.error: BaseException | None = None
        self._closed, self._busy = threading.Event(), threading.Lock()
        self._spoke = 0.0

    # ---- the lock

    def acquire(self) -> None:
        """Takes the address, at once or from a run that says nothing any more. Raises ConfigError where it is held."""
        began, seen = time.monotonic(), None
        while True:
            last = max((int(name) for name in self._names(".lock") if name.isdigit()), default=0)
            held = self._read(f".lock/{last}") if last else None
            if held is None or held["released"] or not _alive_here(held["by"]) or (seen == held and time.monotonic() - began > self.stale):
                if self._create(f".lock/{last + 1}"):
                    self.turn = last + 1
                    return
                continue      # another one was quicker
            if seen is None:
                self.say(f"{self.address} was held by {held['by']}; waiting for {self.stale:.0f} s to see whether that run is alive")
            elif held != seen:
                raise ConfigError(f"workdir={self.address!r} is in use by another run ({held['by']}); give this one a --workdir of its own")
            seen = held
            time.sleep(min(5.0, self.stale / 10))

    def _names(self, folder: str) -> list[str]:
        self.store.invalidate_cache()
        try:
            return [path.rsplit("/", 1)[1] for path in self.store.ls(f"{self.root}/{folder}", detail=False)]
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.store.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None

    def _word(self, released: bool = False) -> bytes:
        return json.dumps({"by": self.me, "at": time.time(), "released": released}).encode()

    def _create(self, name: str) -> bool:
        """Writes a lock that nobody else can write: whether it is ours."""
        with contextlib.suppress(OSError):      # it is there already; each store says so in its own way
            self.store.pipe_file(f"{self.root}/{name}", self._word(), mode="create")
        held = self._read(name)
        return held is not None and held["by"] == self.me

    def _hold(self) -> None:
        if max((int(name) for name in self._names(".lock") if name.isdigit()), default=0) > self.turn:
            raise LostError(f"{self.address} was taken over by another run; this one was silent for too long")
        if time.monotonic() - self._spoke > self.stale / 4:
            self.store.pipe_file(f"{self.root}/.lock/{self.turn}", self._word())
            self._spoke = time.monotonic()

    # ---- files

    def _remote(self) -> dict[str, int]:
        """Size of every file there, by its path; locks left out."""
        self.store.invalidate_cache()
        try:
            found = self.store.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(self.root).lstrip("/"): info["size"] for path, info in found.items()
                if not path.removeprefix(self.root).lstrip("/").startswith(".lock/")}

    def fetch(self) -> None:
        """Makes the folder what the bucket holds; checkpoints without a manifest stay there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        remote = self._remote()
        for path in remote:
            whole = checkpoint_of(path)
            if whole is None or f"{whole}/{MANIFEST}" in remote:
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                self.store.get_file(f"{self.root}/{path}", str(self.folder / path))
                self.sent[path] = stamp(self.folder / path)

    def send(self) -> None:
        """Brings the bucket up to date: what is new goes up, what is gone here goes there."""
        with self._busy:
            self._hold()
            local = {file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()}
            committed = {whole for whole in map(checkpoint_of, local) if whole and f"{whole}/{MANIFEST}" in local}
            plain = sorted(path for path in local if checkpoint_of(path) is None and not path.startswith(".") and not path.endswith(".tmp"))
            inside = sorted((path for path in local if checkpoint_of(path) in committed), key=lambda path: path.endswith(f"/{MANIFEST}"))
            done = [path for path in plain if path.rpartition("/")[2] == "DONE"]      # says that the rest is there
            for path in (*(path for path in plain if path not in done), *inside, *done):
                with contextlib.suppress(FileNotFoundError):      # dropped meanwhile, its manifest first
                    if self.sent.get(path) != (now := stamp(self.folder / path)):
                        self.store.put_file(str(self.folder / path), f"{self.root}/{path}")
                        self.sent[path] = now
            gone = [path for path in self._remote() if path not in (*plain, *inside)]
            for path in sorted(gone, key=lambda path: not path.endswith(f"/{MANIFEST}")):
                self.store.rm_file(f"{self.root}/{path}")
                self.sent.pop(path, None)

    def _watch(self) -> None:
        failures = 0
        while not self._closed.wait(self.every):
            try:
                self.send()
                failures = 0
            except LostError as error:
                self.error = error
                print(f"error: {error}", flush=True)
                os._exit(43)
            except Exception as error:      # of the network: the run goes on, the next turn tries again
                failures += 1
                self.say(f"{self.address} cannot be written ({type(error).__name__}: {error}); {failures} time(s) in a row")

    def start(self) -> None:
        self.thread = threading.Thread(target=self._watch, name="bucket", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Sends the rest and lets go of the address."""
        self._closed.set()
        self.thread.join()
        self.send()
        self.store.pipe_file(f"{self.root}/.lock/{self.turn}", self._word(released=True))


def _alive_here(owner: str) -> bool:
    """False for a process of this host that is gone."""
    host, pid, _ = owner.split(":")
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def checkpoint_of(path: str) -> str | None:
    """The checkpoint that a file belongs to, "1_pretrain/checkpoints/200"; None for other files. Whatever lies in a series belongs to one."""
    parts = path.split("/")
    return next(("/".join(parts[:i + 2]) for i, part in enumerate(parts[:-2]) if part in SERIES), None)


def stamp(file: pathlib.Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def is_address(workdir: str | pathlib.Path) -> bool:
    return "://" in str(workdir)


@contextlib.contextmanager
def mirrored(address: str, say: Callable[[str], None]) -> Iterator[pathlib.Path]:
    """The folder to work in for a work directory in a bucket, kept up to date there until the end, an error's too. Raises ConfigError."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="vlm_jax_run_"))
    mirror = Mirror(address, folder / "run", say, EVERY, STALE)
    try:
        mirror.acquire()
        mirror.fetch()
        mirror.start()
        say(f"{address} is worked on in {mirror.folder} and brought up to date every {mirror.every:.0f} s")
        try:
            yield mirror.folder
        finally:
            mirror.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
