"""Checkpoints that survive a kill at any moment, and say so where they do not.

Layout, on a POSIX file system that all processes share, or in a folder of each process' own (``behind``)::

    DIR/<step>/                 the state, written by Orbax as a flat dict path -> array
    DIR/<step>/manifest.json    written last: leaves, extra data, size and hash of every file
    DIR/<step>/part.<n>.json    folders apart: the same of what process n wrote

Orbax writes into a temporary directory and renames it; then a background thread hashes what lies on
the disk, forces it down, and puts the manifest there in one rename. A directory without a manifest is
therefore a save that did not finish. Only after that are older checkpoints dropped, their manifest
first. Leaves are stored under paths such as 'params/image/blocks/attn/query/kernel', so that a reader
may take the parameters without knowing the optimizer.

Folders apart hold what their process alone has. Whoever owns them (``bucket.Mirror``) brings the parts together in one place, and
there the first process writes the manifest once it has seen the lists of all (``join``). Orbax' last step, an index over what all
processes wrote, is left to whoever first reads them together (``_complete``): saving needs no process' files but its own.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vlm_jax import partitioning

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "manifest.ocdbt"     # Orbax' own, over the files of all processes
# Every device writes a part of an array that they all hold, but not of a small one: to cut it, a program for
# every shape is compiled at the first save, and run at each.
SMALLEST_PART = 2**20   # bytes
WRITERS = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),     # ``_storable`` has copied
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_PART)))
log = logging.getLogger("vlm_jax.checkpoint")

Skipped = list[tuple[int, str]]


class SaveError(RuntimeError):
    """A save that failed, on this process or another one; earlier checkpoints are as they were."""


class DamageError(ValueError):
    """A checkpoint directory that does not count: its save did not finish, or its files are not as written."""


# ---------------------------------------------------------------- state <-> flat dict

def flatten(state: Any) -> dict[str, Any]:
    """Leaves by path, 'opt_state/0/mu/image/norm/scale'. Empty containers and None have no leaves: they
    live in the structure that the restoring side brings. Raises ValueError when two leaves share a path."""
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in flat:
            raise ValueError(f"two leaves of the state share the path {path!r}")
        flat[path] = leaf
    return flat


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype as the manifest has them; "key<...>" names the generator of random keys."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if isinstance(leaf, jax.Array) and _is_key(leaf.dtype):
        described["generator"] = str(jax.random.key_impl(leaf))
    return described


def _storable(path: str, leaf: Any, lent: bool = False) -> Any:
    """What Orbax is handed for a leaf; host arrays are copied, since the caller may go on writing in them, unless they are lent."""
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf) if lent else np.array(leaf)
    if array.dtype.kind in "OUSV" and not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(f"checkpoint leaf {path!r} is {type(leaf).__name__} {leaf!r:.60}, not an array; "
                        f"put it into `extra`")
    return array


# ---------------------------------------------------------------- manifests

def _digest(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digests(files: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_digest, files))


def _sync(path: Path) -> None:
    """Forces a file, or a directory's entries, to the disk. Windows opens no directory, and syncs only what may be written."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _commit(directory: Path, content: dict[str, Any], name: str = MANIFEST) -> None:
    """Writes the manifest of a finished Orbax directory: after this, and not before, it counts."""
    entries = sorted(directory.rglob("*"))
    files = [entry for entry in entries if entry.is_file()]
    names = [file.relative_to(directory).as_posix() for file in files]
    sizes = [file.stat().st_size for file in files]
    content = {**content, "files": {name: [size, digest] for name, size, digest in
                                    zip(names, sizes, _digests(files))}}
    for entry in [*reversed(entries), directory, directory.parent]:
        _sync(entry)
    _put(directory / name, json.dumps({"checksum": _checksum(content), "content": content}).encode())


def _put(file: Path, content: bytes) -> None:
    """A small file that is there whole, or not at all."""
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_bytes(content)
    _sync(fresh)
    os.replace(fresh, file)
    _sync(file.parent)


def read_manifest(directory: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The content of a checkpoint's manifest: format, step, leaves, extra, files.

    Raises DamageError where it is absent, unreadable or altered, ValueError where it has another format:
    that is a checkpoint of another version of this program, not one to pass over.
    """
    file = Path(directory) / name
    if not file.is_file():
        raise DamageError(f"uncommitted: no {name}")
    content = _content(file.read_bytes(), name)
    if content["format"] != FORMAT:
        raise ValueError(f"{file} has format {content['format']}; this program reads format {FORMAT}")
    return content


def _content(raw: bytes, name: str) -> dict[str, Any]:
    try:
        whole = json.loads(raw)
        checksum, content = whole["checksum"], whole["content"]
        intact = checksum == _checksum(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"damaged: {name} is unreadable ({error})") from error
    if not intact:
        raise DamageError(f"damaged: {name} does not match its own checksum")
    return content


def damage(directory: Path) -> str | None:
    """Why a checkpoint directory cannot be used, or None: every file is read and compared."""
    directory, here = Path(directory), partitioning.process_number()
    try:
        files = read_manifest(directory)["files"]
    except DamageError as error:
        return str(error)
    if _is_own(directory):      # what others have of it is looked at when it comes
        if any(_is_of(name, here) and not (directory / name).exists() for name in files):
            _bring(directory)
        files = {name: entry for name, entry in files.items() if _is_of(name, here) or (directory / name).exists()}
    for name, (size, _) in files.items():
        file = directory / name
        if not file.is_file():
            return f"damaged: {name} is missing"
        if file.stat().st_size != size:
            return f"damaged: {name} has {file.stat().st_size} bytes, not {size}"
    try:
        digests = _digests([directory / name for name in files])
    except OSError as error:
        return f"damaged: {error}"
    for (name, (_, digest)), found in zip(files.items(), digests):
        if found != digest:
            return f"damaged: the bytes of {name} do not match their hash"
    return None


def _steps(directory: Path) -> list[int]:
    """Steps that have a directory, committed or not, newest first."""
    found = [entry.name for entry in Path(directory).iterdir() if entry.is_dir()] if Path(directory).is_dir() else []
    return sorted((int(name) for name in found if re.fullmatch(r"\d+", name)), reverse=True)


def latest_good(directory: Path | str) -> tuple[int | None, Skipped]:
    """The newest step whose files all match its manifest (None without one), and what was passed over:
    (step, reason) newest first. With several processes the first one reads, and all are told; where folders are apart, each
    reads its own, and the step is good in all of them."""
    def survey(newest: float = float("inf")) -> tuple[int | None, Skipped]:
        skipped = []
        for step in (step for step in _steps(Path(directory)) if step <= newest):
            reason = damage(Path(directory) / str(step))
            if reason is None:
                return step, skipped
            log.warning("checkpoint %s/%d passed over: %s", directory, step, reason)
            skipped.append((step, reason))
        return None, skipped

    if not is_apart(directory):
        step, skipped = partitioning.from_first(survey)
        return step, [(s, reason) for s, reason in skipped]
    told, newest, agreed = {}, float("inf"), False
    while not agreed:
        found = partitioning.exchange(survey(newest))
        told |= {step: reason for _, skipped in found for step, reason in skipped}
        steps = [step for step, _ in found]
        agreed = None in steps or len(set(steps)) == 1
        newest = None if None in steps else min(steps)
    return newest, sorted(told.items(), reverse=True)


# ---------------------------------------------------------------- folders apart

_root: Path | None = None
_bring: Callable[[Path], None] | None = None


@contextlib.contextmanager
def behind(root: Path, bring: Callable[[Path], None]) -> Iterator[None]:
    """Inside, ``root`` is a folder of this process' own that somebody brings together with one place for all processes.

    Of several, he takes the parts of all there, and puts the manifest here once they have come (``join``, ``accept``). ``bring(directory)``
    makes a checkpoint complete with what lies there: what other processes wrote of it, or all of an older one.
    """
    global _root, _bring
    before, (_root, _bring) = (_root, _bring), (Path(root).absolute(), bring)
    try:
        yield
    finally:
        _root, _bring = before


def is_apart(directory: Path | str) -> bool:
    """Whether all processes write there, each into a folder of its own."""
    return partitioning.process_count() > 1 and _is_own(directory)


def _is_own(directory: Path | str) -> bool:
    return _root is not None and Path(directory).absolute().is_relative_to(_root)


def part(process: int) -> str:
    """The list of what a process wrote of a checkpoint: to be sent after its files."""
    return f"part.{process}.json"


def _is_of(name: str, process: int) -> bool:
    """Whether a file of a checkpoint is that of ``process``: what all write alike is the first one's."""
    found = re.search(r"process_(\d+)(/|$)", name)
    return (int(found[1]) if found else 0) == process


def join(directory: Path, lists: Sequence[bytes]) -> bool:
    """Writes the manifest from the first process' list and those of the others, where all are of one save; whether they are."""
    mine = read_manifest(directory, part(0))
    others = [_content(raw, part(number)) for number, raw in enumerate(lists, 1)]
    if any(other["save"] != mine["save"] for other in others):
        return False
    content = {**mine, "files": {name: entry for each in (mine, *others) for name, entry in each["files"].items()}}
    _put(directory / MANIFEST, json.dumps({"checksum": _checksum(content), "content": content}).encode())
    return True


def accept(directory: Path, process: int, manifest: bytes) -> bool:
    """Puts the manifest that the first process wrote beside the part of ``process``; whether it is of the same save."""
    if _content(manifest, MANIFEST).get("save") != read_manifest(directory, part(process))["save"]:
        return False
    _put(directory / MANIFEST, manifest)
    return True


def _complete(directory: Path) -> None:
    """Makes a committed checkpoint one that Orbax can read: the files of all processes, and an index over them. Raises ValueError."""
    def index() -> None:
        if not (directory / INDEX).exists() and any(directory.glob("ocdbt.process_*")):
            ocp.PyTreeCheckpointHandler().finalize(directory)

    if not _is_own(directory):
        partitioning.from_first(index)
        return
    if not (directory / MANIFEST).exists() or any(not (directory / name).exists() for name in read_manifest(directory)["files"]):
        _bring(directory)
        missing = [name for name in read_manifest(directory)["files"] if not (directory / name).exists()]
        reason = f"damaged: {missing[0]} is missing" if missing else damage(directory)
        if reason:
            raise ValueError(f"checkpoint {directory} cannot be read: {reason}")
    index()


def _remove(directory: Path) -> None:
    """Deletes a checkpoint; its manifest goes first, so that a half deleted one is an uncommitted one."""
    if (directory / MANIFEST).exists():
        (directory / MANIFEST).unlink()
        _sync(directory)
    shutil.rmtree(directory)


# ---------------------------------------------------------------- reading leaves

def _refuse_differences(where: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError naming every kind of difference, with up to five paths of each."""
    def some(paths: Iterable[str], line: Callable[[str], str]) -> list[str]:
        paths = sorted(paths)
        more = [f"  ... and {len(paths) - 5} more"] if len(paths) > 5 else []
        return [f"  {line(path)}" for path in paths[:5]] + more

    def near(path, others):
        close = difflib.get_close_matches(path, list(others), n=1, cutoff=0.6)
        return f" (nearest: {close[0]!r})" if close else ""

    def show(leaf):
        return f"{leaf['dtype']}{leaf['shape']}"

    def differ(path):
        return any(stored[path][key] != wanted[path][key] for key in ("shape", "dtype"))

    lines = some(wanted.keys() - stored.keys(), lambda p: f"missing {p!r}{near(p, stored)}")
    lines += some(stored.keys() - wanted.keys(), lambda p: f"unexpected {p!r}{near(p, wanted)}")
    lines += some(filter(differ, stored.keys() & wanted.keys()),
                  lambda p: f"{p!r} is {show(stored[p])} in the checkpoint, {show(wanted[p])} is wanted")
    if lines:
        raise ValueError(f"checkpoint {where} does not fit the state it is restored into:\n" + "\n".join(lines))


def _read(directory: Path, leaves: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what the manifest describes as ``leaves``: onto their sharding, or as numpy where it is None."""
    stored = {path: leaf for path, leaf in leaves.items() if 0 not in leaf["shape"]}
    arguments = {}
    for path, leaf in stored.items():
        if shardings[path] is None:
            arguments[path] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            arguments[path] = ocp.ArrayRestoreArgs(sharding=shardings[path], strict=True)
    values: dict[str, Any] = {}
    if stored:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            values = reader.restore(directory.absolute(), args=ocp.args.PyTreeRestore(
                item=dict.fromkeys(stored, 0), restore_args=arguments, partial_restore=True))
    for path in leaves.keys() - stored.keys():            # Orbax stores no array without elements
        empty = np.zeros(leaves[path]["shape"], jnp.dtype(leaves[path]["dtype"]))
        values[path] = empty if shardings[path] is None else jax.device_put(empty, shardings[path])
    return {path: jax.random.wrap_key_data(value, impl=leaves[path]["generator"])
            if "generator" in leaves[path] else value for path, value in values.items()}


def load_params(directory: Path | str, pattern: str = ".*", *, collections: Sequence[str] = ("params",),
                sharding: Callable[[str, tuple[int, ...]], Any] | None = None) -> dict[str, Any]:
    """Parameters of the newest good checkpoint under ``directory``, without its optimizer: path -> array.

    Args:
      pattern: regex that the whole path must match ('image/.*'); the collection's name is no part of it.
      collections: parts of the saved state to look into, e.g. ("params", "frozen", "moving") or ("ema",).
      sharding: (path, shape) -> jax sharding for each array; numpy arrays without it.

    Raises FileNotFoundError when there is no good checkpoint (saying why each was passed over), ValueError
    when nothing matches, or two collections hold the same path.
    """
    directory = Path(directory)
    step, skipped = latest_good(directory)
    if step is None:
        reasons = "".join(f"\n  {s}: {reason}" for s, reason in skipped)
        raise FileNotFoundError(f"no good checkpoint under {directory}{reasons}")
    _complete(directory / str(step))
    leaves = read_manifest(directory / str(step))["leaves"]
    owner: dict[str, str] = {}
    for collection in collections:
        for full in (path for path in leaves if path.startswith(collection + "/")):
            path = full[len(collection) + 1:]
            if re.fullmatch(pattern, path):
                if path in owner:
                    raise ValueError(f"{path!r} is both in {owner[path].split('/')[0]!r} and in {collection!r}")
                owner[path] = full
    if not owner:
        close = difflib.get_close_matches(f"{collections[0]}/{pattern}", list(leaves), n=3, cutoff=0.0)
        raise ValueError(f"checkpoint {directory / str(step)}: {pattern!r} matches nothing in {tuple(collections)}; "
                         f"nearest: {', '.join(close)}")
    place = sharding or (lambda path, shape: None)
    shardings = {full: place(path, tuple(leaves[full]["shape"])) for path, full in owner.items()}
    values = _read(directory / str(step), {full: leaves[full] for full in owner.values()}, shardings)
    return {path: values[full] for path, full in owner.items()}


# ---------------------------------------------------------------- writing

class Checkpointer:
    """Saves states under ``directory`` in the background and keeps the newest ``keep`` of them.

    Every process calls every method, in the same order. One save is in flight at a time: the next one
    waits for it. Use as a context manager, or call ``close``: an interpreter that ends without it may
    lose the last save (never an earlier one).
    """

    def __init__(self, directory: Path | str, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep={keep} would keep no checkpoint; nearest: 1")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.directory.mkdir(parents=True, exist_ok=True)
        self._apart, self._process = is_apart(self.directory), partitioning.process_number()
        together = partitioning.process_count() > 1 and not self._apart
        who = ocp.options.MultiprocessingOptions() if together else \
            ocp.options.MultiprocessingOptions(primary_host=self._process, active_processes={self._process})
        # Weights do not compress: zstd would take cores from the training step for a few percent.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=WRITERS, multiprocessing_options=who)
        if self._apart:
            handler.finalize = lambda directory: None      # the index over all files is ``_complete``'s; Orbax knows no subclasses
        self._orbax = ocp.AsyncCheckpointer(handler, multiprocessing_options=who)
        self._thread: threading.Thread | None = None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._in_flight: int | None = None
        self._error: BaseException | None = None
        self._good: set[int] | None = None                # verified, or written here; None before the first look

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def save(self, step: int, state: Any, extra: Any = None, lent: bool = False) -> None:
        """Starts saving a pytree of arrays, scalars and random keys; ``extra`` is anything JSON can hold.

        Returns when all leaves are copied, so that the caller may donate or overwrite them; host arrays that are ``lent`` are not copied,
        and must stay as they are until ``wait``: half the memory for what fills it. Waits for the
        save before this one and raises what went wrong in it. Steps must grow: ValueError when a good
        checkpoint of this step or a newer one exists. What a dead run left unfinished is removed.
        """
        self.wait()
        if self._good is None:
            self.latest_good()
        if step <= max(self._good, default=-1):
            raise ValueError(f"step {step} is not newer than the good checkpoint {self.directory}/{max(self._good)}")
        flat = {path: _storable(path, leaf, lent) for path, leaf in flatten(state).items()}
        content = {"format": FORMAT, "step": int(step), "leaves": {p: _describe(x) for p, x in flat.items()},
                   "extra": json.loads(json.dumps(extra))}
        arrays = {path: jax.random.key_data(x) if _is_key(x.dtype) else x for path, x in flat.items() if x.size}
        target, failed = self.directory / str(int(step)), None
        if self._apart:      # a save that is tried again must not be joined with parts of the first try
            content["save"] = partitioning.from_first(lambda: uuid.uuid4().hex)
        try:
            if partitioning.is_first() or self._apart:
                self._sweep()
            # force: a shared file system may still show another process what was swept
            self._orbax.save(target, args=ocp.args.PyTreeSave(arrays), force=True)
        except OSError as error:
            if not self._apart:
                raise SaveError(f"saving checkpoint {target} failed: {type(error).__name__}: {error}") from error
            failed = error      # the others do not know yet, and are told in ``wait``
        self._in_flight = int(step)
        self._written.clear()
        self._given_up.clear()
        self._thread = threading.Thread(target=self._finish, args=(target, content, failed), name="checkpoint-commit")
        self._thread.start()

    def _finish(self, target: Path, content: dict[str, Any], failed: OSError | None) -> None:
        """Runs in the background: wait for Orbax, write the manifest, then drop what is too old."""
        try:
            if failed:
                raise failed
            self._orbax.wait_until_finished()
            if self._apart:
                for file in [file for file in target.rglob("*") if file.is_file()]:
                    if not _is_of(file.relative_to(target).as_posix(), self._process):
                        file.unlink()
                _commit(target, content, part(self._process))
                self._written.set()
                while not (target / MANIFEST).exists():
                    if self._given_up.wait(0.05):
                        return
            elif partitioning.is_first():
                _commit(target, content)
            if partitioning.is_first() or self._apart:
                committed = [s for s in _steps(self.directory) if (self.directory / str(s) / MANIFEST).exists()]
                for step in committed[self.keep:]:
                    _remove(self.directory / str(step))
        except BaseException as error:                    # kept for the training thread to raise
            if self._written.is_set():      # the save itself is good, which the others know
                log.warning("dropping old checkpoints of %s failed: %s", self.directory, error)
            else:
                self._error = error
        finally:
            self._written.set()

    def _sweep(self) -> None:
        """Removes unfinished saves, and the damaged ones that are newer than the newest good one: they
        would count among the ``keep``, and the last good one would be dropped in their favour."""
        for step in _steps(self.directory):
            path = self.directory / str(step)
            if step > max(self._good, default=-1) or not (path / MANIFEST).exists():
                log.info("removing unusable checkpoint %s", path)
                _remove(path)
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)

    def wait(self) -> None:
        """Blocks until the save in flight is committed. Raises SaveError when it failed, in any process."""
        if self._thread is None:
            return
        self._written.wait()
        failed = any(partitioning.exchange(self._error is not None))
        if failed:
            self._given_up.set()
        self._thread.join()
        self._thread, step, self._in_flight = None, self._in_flight, None
        error, self._error = self._error, None
        if failed:
            reason = f"{type(error).__name__}: {error}" if error else "see the other processes"
            raise SaveError(f"saving checkpoint {self.directory / str(step)} failed: {reason}") from error
        self._good.add(step)

    def busy(self) -> bool:
        """Whether ``wait`` would wait for more than disks: folders are apart, and a save has not come together yet."""
        if not self._apart:
            return False
        states = partitioning.exchange([self._thread is not None and self._thread.is_alive(), self._error is not None])
        return any(alive for alive, _ in states) and not any(failed for _, failed in states)

    def has(self, step: int) -> bool:
        """Whether ``step`` was found good, or committed here."""
        return step in (self._good or ())

    def latest_good(self) -> tuple[int | None, Skipped]:
        """The newest step whose files all match its manifest (None without one), and (step, reason) for the
        newer ones that were passed over: unfinished, missing files, wrong size, wrong bytes."""
        self.wait()
        step, skipped = latest_good(self.directory)
        self._good = {step} - {None}
        return step, skipped

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, Any]:
        """Reads checkpoint ``step`` into the structure of ``abstract_state``: (state, extra).

        Leaves of ``abstract_state`` have shape and dtype (jax.ShapeDtypeStruct, or arrays), and a sharding on
        any mesh; a leaf without a sharding comes back as numpy. Raises ValueError when the files are damaged,
        or naming each path that is missing, unexpected, or of another shape or dtype.
        """
        self.wait()
        where = self.directory / str(step)
        if not self.has(step):
            reason = partitioning.from_first(lambda: damage(where))
            if reason is not None:
                raise ValueError(f"checkpoint {where} cannot be restored: {reason}")
        _complete(where)
        manifest = read_manifest(where)
        wanted = flatten(abstract_state)
        _refuse_differences(where, manifest["leaves"], {path: _describe(leaf) for path, leaf in wanted.items()})
        shardings = {path: getattr(leaf, "sharding", None) for path, leaf in wanted.items()}
        values = _read(where, {path: manifest["leaves"][path] for path in wanted}, shardings)
        structure = jax.tree_util.tree_structure(abstract_state)
        return jax.tree_util.tree_unflatten(structure, [values[path] for path in wanted]), manifest["extra"]

    def close(self) -> None:
        """Waits for the save in flight and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()
