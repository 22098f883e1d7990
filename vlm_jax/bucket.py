"""A work directory in a bucket (s3://, gs://): every process works in a folder of its own and keeps the bucket up to date.

A bucket has no renames, no appends and no locks. So rows are appended and saves are committed on a disk, as ever, and what is new goes up
every few seconds and at the end: a checkpoint's manifest after its files, so that one without a manifest does not count, there as here;
metrics before the checkpoints that they lead to. A start brings down what the bucket holds, which alone is true: what a killed run had
not sent yet is done again.

Of several processes each sends what it alone has of a checkpoint, and then a list of it (``train.checkpoint``, folders apart). Once the
lists of all are there, the first process writes the manifest, and the others take it from the bucket: the save is done when they have it.
Everything else is the first process': it alone holds the lock and removes anything, and what the others need of it (imports, tokenizers,
finished stages) they fetch where all meet (``share``). Where to go on from, they agree on. A process that cannot reach the bucket for
long, or finds another run in it, ends all.

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlm_jax import partitioning
from vlm_jax.data.tars import filesystem
from vlm_jax.errors import ConfigError
from vlm_jax.processes import EXIT_BAD, EXIT_HANG
from vlm_jax.train import checkpoint
from vlm_jax.train.checkpoint import MANIFEST

EVERY = 10.0       # seconds between looks at what is new
SOON = 1.0         # the same while a save waits for the other processes
STALE = 120.0      # seconds without a word after which a lock is nobody's
GONE = 600.0       # seconds without the bucket after which one of several processes ends all, and the last words of any are given up
SERIES = ("checkpoints", "frozen", "best", "result")      # folders whose folders are checkpoints


class LostError(RuntimeError):
    """Another run has taken the work directory over."""


class Mirror:
    """``folder`` on this disk and ``address`` in a bucket, brought together by ``fetch``, ``send`` and ``close``.

    process, count: which of how many processes this is. end: called with an exit code and the reason where all processes have to stop.
    """

    def __init__(self, address: str, folder: pathlib.Path, say: Callable[[str], None] = lambda text: None, every: float = EVERY, stale: float = STALE,
                 process: int = 0, count: int = 1, end: Callable[[int, str], None] = lambda code, text: os._exit(code)):
        self.address, self.folder, self.say, self.every, self.stale = address.rstrip("/"), folder, say, every, stale
        self.process, self.count, self.end = process, count, end
        self.store, self.root = filesystem(self.address)
        self.me, self.turn = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}", 0
        self.sent: dict[str, tuple[int, int] | None] = {}      # path -> (size, time of change) as it was sent, or came
        self.came: dict[str, Any] = {}                  # path -> what the bucket called its content when it came
        self._closed, self._busy = threading.Event(), threading.Lock()
        self._left, self._spoke = threading.Event(), 0.0

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
        """Writes a lock that nobody else can write: whether it is ours. Raises ConfigError where nothing can be written."""
        failed = None
        try:
            self.store.pipe_file(f"{self.root}/{name}", self._word(), mode="create")
        except Exception as error:      # it is there already; each store says so in its own way
            failed = error
        held = self._read(name)
        if held is None:
            raise ConfigError(f"workdir={self.address!r} cannot be written: {type(failed).__name__}: {failed}") from failed
        return held["by"] == self.me

    def _beat(self) -> None:
        """Says that this run is alive, however long a file takes."""
        while not self._left.wait(self.stale / 8):
            try:
                self._hold()
            except LostError as error:
                self._stop(EXIT_BAD, str(error))
            except Exception as error:
                self.say(f"{self.address}: the lock cannot be written ({type(error).__name__}: {error})")

    def _hold(self) -> None:
        if max((int(name) for name in self._names(".lock") if name.isdigit()), default=0) > self.turn:
            raise LostError(f"{self.address} was taken over by another run; this one was silent for too long")
        if not self.process and time.monotonic() - self._spoke > self.stale / 4:
            self.store.pipe_file(f"{self.root}/.lock/{self.turn}", self._word())
            self._spoke = time.monotonic()

    # ---- files

    def _remote(self, below: str = "") -> dict[str, Any]:
        """What the store calls the content of every file there, by its path; locks left out."""
        self.store.invalidate_cache()
        try:
            found = self.store.find(f"{self.root}/{below}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        named = {path.removeprefix(self.root).lstrip("/"): (info["size"], info.get("ETag") or info.get("etag")) for path, info in found.items()}
        return {path: content for path, content in named.items() if not path.startswith(".lock/")}

    def _get(self, path: str, content: Any) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        self.store.get_file(f"{self.root}/{path}", str(self.folder / path))
        self.sent[path], self.came[path] = stamp(self.folder / path), content

    def _bytes(self, path: str) -> bytes | None:
        try:
            return self.store.cat_file(f"{self.root}/{path}")
        except FileNotFoundError:
            return None

    def fetch(self) -> None:
        """Makes the folder what the bucket holds: of each series' checkpoints the newest, and the manifests of the others, which come when they
        are looked at (``complete``); what has no manifest stays there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        remote = self._remote()
        committed = sorted((whole for path in remote if (whole := checkpoint_of(path)) and path == f"{whole}/{MANIFEST}"), key=step_of)
        newest = set({whole.rpartition("/")[0]: whole for whole in committed}.values())
        for path, content in remote.items():
            whole = checkpoint_of(path)
            if whole is None or whole in newest or (whole in committed and path == f"{whole}/{MANIFEST}"):
                self._get(path, content)

    def complete(self, directory: pathlib.Path) -> None:
        """Brings down what this folder lacks of a checkpoint: what other processes sent, or all of an older one."""
        with self._busy:      # or half a file might be sent
            for path, content in self._remote(directory.relative_to(self.folder).as_posix()).items():
                if not (self.folder / path).exists():
                    self._get(path, content)

    def receive(self) -> None:
        """Brings down what the first process sent since, but of checkpoints in which this process has a part: they come where they are read."""
        with self._busy:
            here, remote = self._checkpoints(), self._remote()
            for path, content in remote.items():
                whole = checkpoint_of(path)
                wanted = f"{whole}/{MANIFEST}" in remote and whole not in here if whole else path in self.came or path not in self.sent
                if wanted and self.came.get(path) != content:
                    self._get(path, content)

    def send(self) -> None:
        """Brings the bucket up to date: what is new goes up, what is gone here goes there."""
        with self._busy:
            self._hold()
            there = {} if self.process else self._remote()      # before what is here: a save may begin meanwhile
            here = self._checkpoints() | self._checkpoints()      # twice: a rename may hide a directory from the first look
            local = {file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()}
            self._forget([path for path in self.sent if path.endswith(f"/{MANIFEST}") and self.sent[path] != stamp(self.folder / path)])
            plain = sorted(path for path in local if checkpoint_of(path) is None and not path.startswith(".") and not path.endswith(".tmp"))
            done = [path for path in plain if path.rpartition("/")[2] == "DONE"]      # says that the rest is there
            self._put([path for path in plain if path not in done])
            for whole in sorted(here, key=step_of):
                own, manifest = f"{whole}/{checkpoint.part(self.process)}", f"{whole}/{MANIFEST}"
                if manifest not in self.sent and (own in local or (manifest in local and not self.process)):
                    files = {path for path in local if path.startswith(f"{whole}/")} - {own, manifest}
                    self._put([*sorted(files), *(path for path in (own, manifest) if path in local)])
                    self._join(whole)
            self._put(done)
            if not self.process:
                self._forget([path for path in self.sent if path not in local and not (self.folder / path).exists()])
                self._forget([path for path in there if checkpoint_of(path) and checkpoint_of(path) not in here])

    def _checkpoints(self) -> set[str]:
        """Those of which there is a directory, saves that have not finished among them."""
        return {f"{folder.parent.relative_to(self.folder).as_posix()}/{folder.name.partition('.')[0]}"
                for series in SERIES for folder in self.folder.glob(f"**/{series}/*") if folder.is_dir() and folder.name[:1].isdigit()}

    def _put(self, paths: Sequence[str]) -> None:
        for path in paths:
            now = stamp(self.folder / path)
            if now is None or self.sent.get(path) == now:      # None: dropped meanwhile, its manifest first
                continue
            try:
                self.store.put_file(str(self.folder / path), f"{self.root}/{path}")
            except FileNotFoundError:
                if (self.folder / path).exists():
                    raise
                continue
            self.sent[path] = now
            self.came.pop(path, None)

    def _forget(self, paths: Sequence[str]) -> None:
        """Removes files there, where this is the first process; manifests first."""
        for path in sorted(paths, key=lambda path: not path.endswith(f"/{MANIFEST}")):
            if not self.process:
                with contextlib.suppress(FileNotFoundError):
                    self.store.rm_file(f"{self.root}/{path}")
            self.sent.pop(path, None)

    def _join(self, whole: str) -> None:
        """Writes, or takes over, the manifest of a checkpoint whose parts have all been sent."""
        directory, manifest = self.folder / whole, f"{whole}/{MANIFEST}"
        if self.count == 1 or (directory / MANIFEST).exists() or not (directory / checkpoint.part(self.process)).exists():
            return
        if self.process:
            content = self._bytes(manifest)
            if content is not None and checkpoint.accept(directory, self.process, content):
                self.sent[manifest] = stamp(directory / MANIFEST)
            return
        lists = [self._bytes(f"{whole}/{checkpoint.part(other)}") for other in range(1, self.count)]
        if None not in lists and checkpoint.join(directory, lists):
            self._put([manifest])

    def _waiting(self) -> bool:
        """Whether a save here waits for other processes."""
        return self.count > 1 and any(not (found.parent / MANIFEST).exists() for found in self.folder.glob(f"**/{checkpoint.part(self.process)}"))

    # ---- in a run

    def begin(self) -> None:
        """Takes the address and fetches what it holds: every process calls it. Raises ConfigError where another run holds it."""
        def take() -> tuple[int, str]:
            try:
                self.acquire()
            except ConfigError as error:
                return 0, str(error)
            remote = self._remote()
            self._forget([path for path in remote if (whole := checkpoint_of(path)) and f"{whole}/{MANIFEST}" not in remote])      # of a dead run
            return self.turn, ""

        self.turn, error = partitioning.from_first(take)
        if error:
            raise ConfigError(error)
        self._spoke = time.monotonic()
        self.beat = threading.Thread(target=self._beat, name="bucket lock", daemon=True)
        self.beat.start()
        self.fetch()

    def share(self) -> None:
        """What the first process has written so far is in every folder: every process calls it."""
        if self.count > 1:
            partitioning.from_first(lambda: self._insist(self.send))
            if self.process:
                self._insist(self.receive)

    def _insist(self, act: Callable[[], None]) -> None:
        began = time.monotonic()
        while True:
            try:
                return act()
            except LostError:
                raise
            except Exception as error:      # of the network
                if time.monotonic() - began > GONE:
                    raise
                self.say(f"{self.address}: {type(error).__name__}: {error}; trying again")
                time.sleep(min(5.0, self.every))

    def _watch(self) -> None:
        failures, looked, worked = 0, 0.0, time.monotonic()
        while not self._closed.wait(min(self.every, SOON)):
            if time.monotonic() - looked < self.every and not self._waiting():
                continue
            looked = time.monotonic()
            try:
                self.send()
                failures, worked = 0, time.monotonic()
            except LostError as error:
                self._stop(EXIT_BAD, str(error))
            except Exception as error:      # of the network: the run goes on, the next turn tries again
                failures += 1
                text = f"{self.address} cannot be written ({type(error).__name__}: {error})"
                self.say(f"{text}; {failures} time(s) in a row")
                if self.count > 1 and time.monotonic() - worked > GONE:      # no save comes together any more
                    self._stop(EXIT_HANG, f"{text} since {GONE:.0f} s")

    def _stop(self, code: int, text: str) -> None:
        print(f"error: {text}", flush=True)
        self.end(code, text)

    def start(self) -> None:
        self.thread = threading.Thread(target=self._watch, name="bucket", daemon=True)
        self.thread.start()

    def close(self, orderly: bool = True) -> None:
        """Sends the rest and lets go of the address. Where it is not orderly, other processes may write for some seconds yet: nobody lets go."""
        self._closed.set()
        self.thread.join()
        if orderly:
            self._insist(self.send)
        else:
            self.send()
        if orderly and self.count > 1:
            partitioning.exchange(True)
        self._left.set()
        self.beat.join()
        if not self.process and (orderly or self.count == 1):
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


def step_of(whole: str) -> int:
    step = whole.rpartition("/")[2]
    return int(step) if step.isdigit() else -1


def stamp(file: pathlib.Path) -> tuple[int, int] | None:
    """What tells the content of a file from an earlier one; None where there is no file."""
    with contextlib.suppress(FileNotFoundError):
        found = file.stat()
        return found.st_size, found.st_mtime_ns
    return None


def is_address(workdir: str | pathlib.Path) -> bool:
    return "://" in str(workdir)


@contextlib.contextmanager
def mirrored(address: str, say: Callable[[str], None], end: Callable[[int, str], None]) -> Iterator[Mirror]:
    """A folder to work in for a work directory in a bucket, kept up to date there until the end, an error's too. Of several processes, every one
    calls it. Raises ConfigError."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="vlm_jax_run_"))
    mirror = Mirror(address, folder / "run", say, EVERY, STALE, partitioning.process_number(), partitioning.process_count(), end)
    orderly = False
    try:
        mirror.begin()
        mirror.start()
        say(f"{address} is worked on in {mirror.folder} and brought up to date every {mirror.every:.0f} s")
        try:
            with checkpoint.behind(mirror.folder, mirror.complete):
                yield mirror
            orderly = True
        finally:
            mirror.close(orderly)
    finally:
        mirror._left.set()
        shutil.rmtree(folder, ignore_errors=True)
