"""Collects image-text pairs balanced over queries, as CLIP's data was collected and MetaCLIP rebuilt it (arXiv 2309.16671).

python -m vlm_jax.data.curate queries --corpus=wiki.txt --list=titles.txt --out=DIR
python -m vlm_jax.data.curate match   --input='tars:POOL/{00000..09999}.tar' --out=DIR
python -m vlm_jax.data.curate balance --cap=20000 --seed=0 --out=DIR

``queries`` lists what is asked for (vlm_jax/data/queries.py); ``match`` finds the queries that each pair's text holds, drops
pairs that hold none, and counts; ``balance`` keeps a pair where one of its queries keeps it, each with probability
cap / max(count, cap), and writes what is kept as tars that ``tars:`` reads.

A tar is a unit of work, and its result a pure function of it: written whole or not at all, found again after a kill, the same
bytes however the work is split. --shards=I/N does the tars of unit I (from 0) of N, so that any array of jobs will do,

    --shards=$SLURM_ARRAY_TASK_ID/64      --shards=$JOB_COMPLETION_INDEX/64      seq 0 15 | xargs -P16 -I{} ... --shards={}/16

one array for ``match``, and when it is done one for ``balance`` (which adds the counts of all units), then

python -m vlm_jax.data.curate report  --cap=20000 --seed=0 --out=DIR

which one unit writes by itself. Beneath DIR, with the tars' own folders and names:

    queries.tsv                     query, count in the corpus, origin
    match/settings.json             the tars and the caption field
    match/X.tar.jsonl               what was found in a tar: a line of totals, then one for each pair that matches
    match/counts-I-of-N.npz         pairs of a unit for each query
    cap_C_seed_S/X.tar, X.tar.idx   what is kept, and its index
    cap_C_seed_S/counts-I-of-N.npz  kept pairs of a unit for each query
    cap_C_seed_S/report.json, report.txt, queries.tsv    (query, pairs before, pairs after)

A larger cap keeps what a smaller one keeps, with the same seed. A pair is drawn for by its key and its captions: the tar that it
lies in does not matter. A pair of several captions holds what any of them holds.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import io
import json
import os
import re
import secrets
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from vlm_jax.data import queries, tars
from vlm_jax.data.bad import BadSample
from vlm_jax.data.order import hash64
from vlm_jax.data.record import RecordSource, parse_captions
from vlm_jax.errors import ConfigError, nearest

LARGEST = 20    # queries that the report names


# ---- files -------------------------------------------------------------------------------------

@contextlib.contextmanager
def _written(path: str) -> Iterator[IO[bytes]]:
    """A file that appears whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _write_json(path: str, value: Any) -> None:
    with _written(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def _opened(path: str) -> IO[bytes]:
    if not tars.is_remote(path):
        return open(path, "rb")
    import fsspec
    return fsspec.open(path, "rb").open()


def parse_unit(text: str) -> tuple[int, int]:
    """"I/N" -> (I, N)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    unit, units = (int(x) for x in match.groups()) if match else (0, 0)
    if not unit < units:
        raise ConfigError(f"--shards={text!r} is no unit I/N with I from 0 to N-1; nearest: '{max(0, units - 1)}/{max(1, units)}'")
    return unit, units


def beneath(paths: Sequence[str]) -> list[str]:
    """Absolute paths (or addresses) without the folders that all of them share: names for what is made of each."""
    parts = [path.split("/") for path in paths]
    shared = len(os.path.commonprefix([folders for *folders, _ in parts]))
    return ["/".join(p[shared:]).lstrip("/") for p in parts]


# ---- what was found in a tar -------------------------------------------------------------------

class Shard(RecordSource):
    """A tar read once from end to end: its captions in memory, and where the members of each sample lie."""

    def __init__(self, path: str, caption: str):
        super().__init__(path, caption)
        wanted = tuple({"." + field.kind for field, _ in self.captions})
        self._text: dict[int, bytes] = {}
        with _opened(path) as file:
            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            def members() -> Iterator[tuple[str, int, int]]:
                for name, offset, size in tars.scan_members(read, file.seek(0, io.SEEK_END), self.counts):
                    if name.lower().endswith(wanted):
                        self._text[offset] = read(offset, size)
                    yield name, offset, size
            if read(0, 2) == b"\x1f\x8b":
                raise ConfigError(f"{path} is compressed; members are copied by offset, so unpack it first (gunzip)")
            samples = tars.join_members(members(), self.counts)
        self.kinds = {kind for kinds in samples.values() for kind in kinds}
        self.members: list[tuple[str, dict[str, tuple[int, int]]]] = []
        for key, kinds in samples.items():
            if not any(kind in tars.IMAGE_KINDS for kind in kinds):
                self.counts["missing_image"] += 1
            elif not any("." + kind in wanted for kind in kinds):
                self.counts["missing_caption"] += 1
            else:
                self.members.append((key, kinds))

    def __len__(self) -> int:
        return len(self.members)

    def key(self, i: int) -> str:
        return self.members[i][0]

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        return {kind: self._text[offset] for kind, (offset, _) in self.members[i][1].items() if offset in self._text}


class Pair(NamedTuple):
    """A pair that holds queries: its key, a hash of key and captions, the queries' numbers, {extension: (offset, size)}."""
    key: str
    hash: int
    queries: list[int]
    members: dict[str, tuple[int, int]]


class Found(NamedTuple):
    """What ``match`` found in a tar. ``totals``: "tar", "stamp" (``tars.stamp_of``), "pairs" read, "left_out" by reason."""
    totals: dict[str, Any]
    pairs: list[Pair]


def find(path: str, caption: str, matcher: queries.Matcher) -> Found:
    """Reads a tar and matches its captions."""
    stamp = tars.stamp_of(path)
    shard, pairs, read = Shard(path, caption), [], 0
    for i, (key, members) in enumerate(shard.members):
        try:
            texts = shard.read_text(i)
        except BadSample as error:
            shard.counts[error.reason] += 1
            continue
        read += 1
        found = matcher(texts)
        if found:
            name = hashlib.blake2b("\0".join([key, *texts]).encode(), digest_size=8).digest()
            pairs.append(Pair(key, int.from_bytes(name, "little"), found, members))
    return Found({"tar": path, "stamp": stamp, "pairs": read, "left_out": dict(sorted(shard.counts.items()))}, pairs)


def write_found(path: str, found: Found) -> None:
    with _written(path) as file:
        for row in (found.totals, *found.pairs):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_found(path: str) -> Found | None:
    """None where there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return Found(json.loads(file.readline()), [Pair(*json.loads(line)) for line in file])
    except FileNotFoundError:
        return None


# ---- counts of units ---------------------------------------------------------------------------

def count(pairs: Sequence[Pair], size: int) -> np.ndarray:
    """Pairs for each query: int64 [size]."""
    return np.bincount(np.array([query for pair in pairs for query in pair.queries], np.int64), minlength=size)


def write_counts(folder: str, unit: int, units: int, counts: np.ndarray, totals: Mapping[str, Any]) -> None:
    """A unit's file; what an earlier run in another number of units left is taken away."""
    for name in glob.glob("counts-*-of-*.npz", root_dir=folder):
        if not name.endswith(f"-of-{units}.npz"):
            os.unlink(os.path.join(folder, name))
    with _written(os.path.join(folder, f"counts-{unit}-of-{units}.npz")) as file:
        np.savez(file, counts=counts, totals=np.array(json.dumps(totals)))


def add_counts(folder: str, command: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Sums of what all units of ``command`` wrote: counts int64 [queries], totals. Raises ConfigError naming those that are missing."""
    names = glob.glob("counts-*-of-*.npz", root_dir=folder)
    if not names:
        raise ConfigError(f"{folder} holds no counts; run {command} first")
    units = int(names[0].removesuffix(".npz").rpartition("-")[2])
    wanted = [f"counts-{unit}-of-{units}.npz" for unit in range(units)]
    missing = [name for name in wanted if name not in names]
    if missing:
        told = ", ".join(f"--shards={name.split('-')[1]}/{units}" for name in missing[:8])
        raise ConfigError(f"{folder} lacks the counts of {len(missing)} of {units} units; run {command} with {told}"
                          + (" ..." if len(missing) > 8 else ""))
    counts: np.ndarray | int = 0
    totals: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for name in wanted:
        with np.load(os.path.join(folder, name)) as file:
            counts = counts + file["counts"]
            told = json.loads(str(file["totals"]))
        left_out.update(told.pop("left_out", {}))
        totals.update(told)
    return counts, {**totals, "left_out": dict(left_out)}


# ---- match -------------------------------------------------------------------------------------

class Run:
    """The folder of a collection: its queries, its tars, and where things lie."""

    def __init__(self, out: str, tar_paths: Sequence[str], caption: str):
        self.out, self.tars, self.caption = out, list(tar_paths), caption
        self.names = beneath(self.tars)
        self.matches = os.path.join(out, "match")

    @property
    def queries_path(self) -> str:
        return os.path.join(self.out, "queries.tsv")

    @property
    def settings_path(self) -> str:
        return os.path.join(self.matches, "settings.json")

    def found_path(self, i: int) -> str:
        return os.path.join(self.matches, self.names[i] + ".jsonl")

    def balanced(self, cap: int, seed: int) -> str:
        return os.path.join(self.out, f"cap_{cap}_seed_{seed}")

    def read_queries(self) -> list[str]:
        if not os.path.exists(self.queries_path):
            raise ConfigError(f"--out={self.out} holds no queries.tsv; run queries first")
        return queries.read(self.queries_path)

    def settings(self) -> dict[str, Any]:
        with open(self.queries_path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        return {"caption": self.caption, "queries": digest, "input": self.tars}

    def settle(self) -> None:
        """Writes the settings where there are none. Raises ConfigError where this folder was begun with others."""
        mine = self.settings()
        if not os.path.exists(self.settings_path):
            _write_json(self.settings_path, mine)
        theirs = Run.read_settings(self.out)
        for name, value in mine.items():
            if value != theirs[name]:
                told = {"caption": f"--caption={value!r}", "queries": "queries.tsv",
                        "input": f"--input ({len(value)} tars, from {value[0]} to {value[-1]})"}[name]
                before = {"caption": repr(theirs[name]), "queries": "another list",
                          "input": f"{len(theirs['input'])} tars, from {theirs['input'][0]} to {theirs['input'][-1]}"}[name]
                raise ConfigError(f"{told} is not what {self.matches} was begun with ({before}); "
                                  f"take another --out, or delete {self.matches} to begin again")

    @staticmethod
    def read_settings(out: str) -> dict[str, Any]:
        path = os.path.join(out, "match", "settings.json")
        try:
            with open(path, encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            raise ConfigError(f"--out={out} holds no match/settings.json; run match first") from None

    @classmethod
    def open(cls, out: str) -> "Run":
        """A folder that was matched. Raises ConfigError where its queries have changed since."""
        told = cls.read_settings(out)
        run = cls(out, told["input"], told["caption"])
        run.read_queries()
        run.settle()
        return run


def find_input(spec: str) -> list[str]:
    """The tars of "tars:PATTERN", or of several joined by ";". Raises ConfigError."""
    paths = []
    for part in filter(None, (p.strip() for p in spec.split(";"))):
        scheme, colon, pattern = part.partition(":")
        if scheme != "tars" or not colon:
            raise ConfigError(f"--input={part!r} is not a source of tars; nearest: 'tars:{pattern if colon else part}'")
        try:
            paths += [path if tars.is_remote(path) else os.path.abspath(path) for path in tars.find_files(pattern)]
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError(f"--input={part!r}: {error}") from None
    twice = next((path for path, n in Counter(paths).items() if n > 1), None)
    if twice or not paths:
        raise ConfigError(f"--input={spec!r} names {twice + ' twice' if twice else 'no tar'}")
    return paths


def match(out: str, source: str, caption: str = "txt", shards: str = "0/1") -> None:
    """Finds the queries in a unit's tars and counts them. Raises ConfigError."""
    unit, units = parse_unit(shards)
    try:
        parse_captions(caption)
    except ValueError as error:
        raise ConfigError(f"--caption={caption!r}: {error}") from None
    run = Run(out, find_input(source), caption)
    texts = run.read_queries()
    run.settle()
    matcher = queries.Matcher(texts)
    counts = np.zeros(len(texts), np.int64)
    totals = {"tars": 0, "pairs": 0, "matched": 0}
    left_out: Counter[str] = Counter()
    mine = range(unit, len(run.tars), units)
    for i in mine:
        found = read_found(run.found_path(i))
        if found is None or found.totals["stamp"] != tars.stamp_of(run.tars[i]):
            found = find(run.tars[i], caption, matcher)
            write_found(run.found_path(i), found)
        counts += count(found.pairs, len(texts))
        left_out.update(found.totals["left_out"])
        for name, more in (("tars", 1), ("pairs", found.totals["pairs"]), ("matched", len(found.pairs))):
            totals[name] += more
        print(f"{run.tars[i]}: {found.totals['pairs']:,} pairs, {len(found.pairs):,} hold a query, "
              f"left out {found.totals['left_out'] or 'nothing'}", flush=True)
    if mine and not totals["pairs"]:
        first = run.tars[mine[0]]
        raise ConfigError(f"no pair with an image and a caption in {len(mine)} tars from {first} on: --caption={caption!r}"
                          f"{nearest(caption, sorted(Shard(first, caption).kinds))}; left out: {dict(left_out) or 'nothing'}")
    write_counts(run.matches, unit, units, counts, {**totals, "left_out": dict(left_out)})
    print(f"unit {unit} of {units}: {totals['matched']:,} of {totals['pairs']:,} pairs hold a query")


# ---- balance -----------------------------------------------------------------------------------

def draw(seed: int, pairs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), each a function of its seed, pair (uint64 hash) and query number."""
    return (hash64(seed, pairs, numbers) >> np.uint64(11)) * 2.0**-53


def keep(pairs: Sequence[Pair], counts: np.ndarray, cap: int, seed: int) -> list[Pair]:
    """The pairs that one of their queries keeps: each does so with probability cap / max(count, cap), independently of the others.

    That is the first success on a walk along a pair's queries, whatever their order.
    """
    if not pairs:
        return []
    number = np.array([query for pair in pairs for query in pair.queries])
    many = [len(pair.queries) for pair in pairs]
    hashes = np.repeat(np.array([pair.hash for pair in pairs], np.uint64), many)
    success = draw(seed, hashes, number) < cap / np.maximum(counts[number], cap)
    kept = np.logical_or.reduceat(success, np.cumsum([0, *many[:-1]]))
    return [pair for pair, stays in zip(pairs, kept.tolist(), strict=True) if stays]


def copy_pairs(source: str, target: str, pairs: Sequence[Pair]) -> None:
    """Writes a tar of some of a tar's pairs, members in the order that they have there, and its index."""
    for left in glob.glob(glob.escape(target) + ".*.tmp"):    # by a process that was killed
        os.unlink(left)
    members = sorted((offset, size, f"{pair.key}.{kind}") for pair in pairs for kind, (offset, size) in pair.members.items())
    with _opened(source) as file, _written(target) as out, tarfile.open(fileobj=out, mode="w") as tar:
        for offset, size, name in members:
            info = tarfile.TarInfo(name)
            info.size = size
            file.seek(offset)
            tar.addfile(info, file)
    tars.open_index(target)


def _holds(target: str, pairs: Sequence[Pair], found: str) -> bool:
    """Whether a tar of just these pairs is there, no older than what was found in its source; makes its index where that is missing."""
    if not os.path.exists(target) or os.stat(target).st_mtime_ns < os.stat(found).st_mtime_ns:
        return False
    index = tars.open_index(target)
    return index.samples == len(pairs) and all(index.key(row) == pair.key for row, pair in enumerate(pairs))


def balance(out: str, cap: int, seed: int = 0, shards: str = "0/1") -> None:
    """Writes what is kept of a unit's tars; a single unit writes the report too. Raises ConfigError."""
    unit, units = parse_unit(shards)
    check(cap, seed)
    run = Run.open(out)
    counts, _ = add_counts(run.matches, "match")
    folder = run.balanced(cap, seed)
    kept_counts, total = np.zeros_like(counts), 0
    for i in range(unit, len(run.tars), units):
        found, path = read_found(run.found_path(i)), run.tars[i]
        if found is None:
            raise ConfigError(f"{run.found_path(i)} is missing; run match again")
        if found.totals["stamp"] != tars.stamp_of(path):
            raise ConfigError(f"{path} has changed since it was matched; run match again")
        kept, target = keep(found.pairs, counts, cap, seed), os.path.join(folder, run.names[i])
        if not _holds(target, kept, run.found_path(i)):
            copy_pairs(path, target, kept)
        kept_counts += count(kept, len(counts))
        total += len(kept)
        print(f"{target}: {len(kept):,} of {found.totals['pairs']:,} pairs", flush=True)
    os.makedirs(folder, exist_ok=True)
    write_counts(folder, unit, units, kept_counts, {"kept": total})
    if units == 1:
        print(report(out, cap, seed))


def check(cap: int, seed: int) -> None:
    if cap < 1 or seed < 0:
        raise ConfigError(f"--cap={cap}, --seed={seed} must be at least 1 and 0")


# ---- the report --------------------------------------------------------------------------------

def report(out: str, cap: int, seed: int = 0) -> str:
    """Adds what the units counted, writes the report beside the tars and returns its text. Raises ConfigError."""
    check(cap, seed)
    run = Run.open(out)
    texts, folder = run.read_queries(), run.balanced(cap, seed)
    before, totals = add_counts(run.matches, "match")
    after, kept = add_counts(folder, f"balance --cap={cap} --seed={seed}")
    over = before > cap
    matches = int(before.sum())
    order = np.argsort(-before, kind="stable")[:LARGEST]
    found = {
        "cap": cap, "seed": seed, "caption": run.caption, "tars": totals["tars"], "left_out": totals["left_out"],
        "pairs": {"read": totals["pairs"], "matched": totals["matched"], "kept": kept["kept"]},
        "matched_share": totals["matched"] / max(1, totals["pairs"]), "kept_share": kept["kept"] / max(1, totals["pairs"]),
        "matches": matches, "matches_per_pair": matches / max(1, totals["matched"]),
        "queries": {"all": len(texts), "unmatched": int((before == 0).sum()), "over_cap": int(over.sum())},
        "over_cap_share_of_matches": int(before[over].sum()) / max(1, matches),
        "largest": [{"query": texts[i], "before": int(before[i]), "after": int(after[i])} for i in order if before[i]],
    }
    _write_json(os.path.join(folder, "report.json"), found)
    with _written(os.path.join(folder, "queries.tsv")) as file:
        file.writelines(f"{text}\t{b}\t{a}\n".encode() for text, b, a in zip(texts, before.tolist(), after.tolist(), strict=True))
    text = _told(found)
    with _written(os.path.join(folder, "report.txt")) as file:
        file.write(text.encode() + b"\n")
    return text


def _told(found: Mapping[str, Any]) -> str:
    pairs, asked, share = found["pairs"], found["queries"], "{:.1%}".format
    rows = [
        ("pairs read", pairs["read"], f"{found['tars']:,} tars"),
        ("  that hold a query", pairs["matched"], share(found["matched_share"])),
        ("  kept", pairs["kept"], f"{share(found['kept_share'])} of all, {share(pairs['kept'] / max(1, pairs['matched']))} of those"),
        ("matches", found["matches"], f"{found['matches_per_pair']:.2f} in a pair that holds any"),
        ("queries", asked["all"], ""),
        ("  without a match", asked["unmatched"], share(asked["unmatched"] / max(1, asked["all"]))),
        (f"  over the cap of {found['cap']:,}", asked["over_cap"], f"{share(found['over_cap_share_of_matches'])} of matches"),
        *(("left out: " + reason, count, "") for reason, count in found["left_out"].items()),
    ]
    lines = [f"{name:<32}{count:>16,}  {more}".rstrip() for name, count, more in rows]
    lines += ["", f"{'largest queries':<32}{'before':>16}{'after':>16}"]
    lines += [f"{row['query']:<32}{row['before']:>16,}{row['after']:>16,}" for row in found["largest"]]
    return "\n".join(lines)


# ---- the command -------------------------------------------------------------------------------

def list_queries(out: str, corpus: Sequence[str], lists: Sequence[str], *, caption: str | None, word_count: int, pmi: float,
                 bigram_count: int) -> queries.Built:
    """Writes OUT/queries.tsv. ``corpus``: text files, a text a line, or data sources; ``lists``: files, a query a line. Raises ConfigError."""
    from vlm_jax.data.tokenizers import captions
    if not corpus and not lists:
        raise ConfigError("--corpus and --list are missing: give at least one")

    def texts() -> Iterator[str]:
        for name in corpus:
            try:
                yield from captions(name, sys.maxsize, caption)
            except (ValueError, OSError, ImportError) as error:
                raise ConfigError(f"--corpus={name} is neither a text file nor a data source that opens: {error}") from None

    found = queries.build(texts if corpus else None, {name: queries.read_lines(name) for name in lists},
                          word_count=word_count, pmi=pmi, bigram_count=bigram_count)
    with _written(os.path.join(out, "queries.tsv")) as file:
        file.writelines(line.encode() for line in queries.to_lines(found.queries))
    return found


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are ConfigErrors like any other."""

    def error(self, message: str):
        raise ConfigError(message)


def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m vlm_jax.data.curate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = argparse.ArgumentDefaultsHelpFormatter
    one = commands.add_parser("queries", help="build the list of queries", formatter_class=shown)
    one.add_argument("--corpus", nargs="+", default=[], help="text files, a text a line, or data sources (tars:..., jsonl:...)")
    one.add_argument("--list", nargs="+", default=[], help="files of your own queries, one a line")
    one.add_argument("--caption", default=None, help="caption field of a corpus that is a data source, as in data.caption")
    one.add_argument("--word_count", type=int, default=100, help="times that a word must occur")
    one.add_argument("--pmi", type=float, default=30, help="pointwise mutual information that a bigram must reach, in bits")
    one.add_argument("--bigram_count", type=int, default=2, help="times that a bigram must occur")
    two = commands.add_parser("match", help="find and count the queries in a pool of tars", formatter_class=shown)
    two.add_argument("--input", required=True, help="the pool: tars:PATHS, with braces or globs, several joined by ;")
    two.add_argument("--caption", default="txt", help="caption field: txt, json:FIELD, or several joined by ;")
    three = commands.add_parser("balance", help="write the balanced tars", formatter_class=shown)
    four = commands.add_parser("report", help="add what the units of balance counted", formatter_class=shown)
    for command in (two, three):
        command.add_argument("--shards", default="0/1", help="I/N: this process does unit I (from 0) of N")
    for command in (three, four):
        command.add_argument("--cap", type=int, default=20_000, help="pairs that a query is meant to keep at most")
        command.add_argument("--seed", type=int, default=0)
    for command in (one, two, three, four):
        command.add_argument("--out", required=True, help="folder of this collection")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _arguments().parse_args(argv)
        if args.command == "queries":
            found = list_queries(args.out, args.corpus, args.list, caption=args.caption, word_count=args.word_count, pmi=args.pmi,
                                 bigram_count=args.bigram_count)
            origins = Counter(origin for query in found.queries for origin in query.origin)
            print(f"{os.path.join(args.out, 'queries.tsv')}: {len(found.queries):,} queries "
                  f"({', '.join(f'{name} {n:,}' for name, n in origins.items())}) from {found.words:,} words of corpus")
            if args.corpus and not origins["bigram"]:
                print(f"no bigram reaches --pmi={args.pmi:g}; in so many words one that occurs --bigram_count={args.bigram_count} times "
                      f"can reach {queries.highest_pmi(found.words, args.bigram_count):.1f}")
        elif args.command == "match":
            match(args.out, args.input, args.caption, args.shards)
        elif args.command == "balance":
            balance(args.out, args.cap, args.seed, args.shards)
        else:
            print(report(args.out, args.cap, args.seed))
    except (ConfigError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    return 0


if __name__ == "__main__":
    sys.exit(main())
