"""How fast data is collected (vlm_jax/data/curate.py): captions a second of one core, with 500,000 queries.

    python -m benchmarks.curate [--queries 500000] [--captions 100000] [--out=FILE.json]

match       the matcher alone, on captions in memory. Beside it the Aho-Corasick libraries for Python, where they are installed
            (pip install pyahocorasick ahocorasick-rs): they must find the same.
match, tars python -m vlm_jax.data.curate match, reading and writing included, on tars of small images.
balance     the same of balance, a pair's bytes copied where it is kept.

Captions are synthetic: words with Zipf's frequencies, of which the most frequent are queries, beside runs of two to six words.
Nearly every word is thus a query (over ten matches in a caption, where MetaCLIP had 3.5), which is the slow case. Times are processor
time; memory is what building the matcher adds to the process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import os
import pathlib
import string
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import paired
from vlm_jax.data import curate, queries

RUNS = {2: .64, 3: .24, 4: .08, 6: .04}     # words of the longer queries: their shares
PEERS = ("pyahocorasick", "ahocorasick-rs")
MODULES = {"pyahocorasick": "ahocorasick", "ahocorasick-rs": "ahocorasick_rs"}


def resident() -> float:
    """MB of memory in use (Linux)."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def synthetic(many: int, captions: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """(queries, captions); half of the queries are words."""
    rng = np.random.default_rng(seed)
    letters = np.array(list(string.ascii_lowercase))
    size = 2 + np.log2(np.arange(1, 2 * many + 1)).astype(int) // 3 + rng.integers(0, 4, 2 * many)
    text = "".join(rng.choice(letters, size.sum()))
    ends = np.cumsum(size)
    words = list(dict.fromkeys(text[end - n:end] for end, n in zip(ends.tolist(), size.tolist(), strict=True)))
    chance = np.cumsum(1 / np.arange(1, len(words) + 1))
    some = lambda n: [words[i] for i in np.searchsorted(chance, rng.random(n) * chance[-1]).tolist()]  # noqa: E731
    asked = dict.fromkeys(words[:many // 2])
    for length, share in RUNS.items():
        row = some(int(length * share * many * 2))
        runs = dict.fromkeys(" ".join(row[at:at + length]) for at in range(0, len(row), length))
        asked.update(dict.fromkeys(list(runs)[:round(share * many / 2)]))
    lengths = np.clip(rng.geometric(.1, captions) + 2, 3, 60)
    row, at, told = some(int(lengths.sum())), 0, []
    comma = (rng.random(len(row)) < .06).tolist()
    for n in lengths.tolist():
        told.append(" ".join(word + "," * mark for word, mark in zip(row[at:at + n], comma[at:at + n], strict=True)))
        at += n
    return list(asked), told


def peer(name: str, asked: Sequence[str]) -> Callable[[Sequence[str]], list[int]]:
    spaced = [f" {query} " for query in asked]
    if name == "pyahocorasick":
        import ahocorasick
        automaton = ahocorasick.Automaton()
        for number, query in enumerate(spaced):
            automaton.add_word(query, number)
        automaton.make_automaton()
        return lambda texts: sorted({number for text in texts for _, number in automaton.iter(f" {' '.join(queries.split(text))} ")})
    import ahocorasick_rs
    finder = ahocorasick_rs.AhoCorasick(spaced, store_patterns=False)
    return lambda texts: sorted({found[0] for text in texts for found in
                                 finder.find_matches_as_indexes(f" {' '.join(queries.split(text))} ", overlapping=True)})


def timed(work: Callable[[], object]) -> tuple[object, float]:
    began = time.process_time()
    return work(), time.process_time() - began


def write_tars(folder: str, captions: Sequence[str], image: int, each: int = 10_000) -> str:
    """Tars of ``each`` pairs with images of so many bytes; their pattern."""
    picture = os.urandom(image)
    for shard in range(0, len(captions), each):
        with tarfile.open(f"{folder}/{shard // each:05d}.tar", "w") as tar:
            for i, text in enumerate(captions[shard:shard + each], shard):
                for kind, content in (("jpg", picture), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"{i:08d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"tars:{folder}/*.tar"


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--queries", type=int, default=500_000)
    flags.add_argument("--captions", type=int, default=100_000)
    flags.add_argument("--image", type=int, default=8_000, help="bytes of an image (default %(default)s)")
    flags.add_argument("--cap", type=int, default=100, help="of balance; few captions need a low one (default %(default)s)")
    given = paired.parse(flags, argv, quick=dict(queries=2000, captions=500))
    machine = paired.machine()
    asked, captions = synthetic(given.queries, given.captions)
    sides = {"match": lambda: queries.Matcher(asked),
             **{name: lambda name=name: peer(name, asked) for name in PEERS if importlib.util.find_spec(MODULES[name])}}
    rows, matches = {}, None
    for name, build in sides.items():
        gc.collect()
        before = resident()
        matcher, seconds = timed(build)
        rows[name] = {"build_s": seconds, "memory_mb": resident() - before}
        found, rows[name]["s"] = timed(lambda matcher=matcher: [matcher([text]) for text in captions])
        matches = matches or found
        assert found == matches, f"{name} finds other matches"
        del matcher, found
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = f"{folder}/out"
        source = write_tars(folder, captions, given.image)
        os.makedirs(out)
        pathlib.Path(out, "queries.tsv").write_text("".join(f"{query}\n" for query in asked))
        for name, work in (("match, tars", lambda: curate.match(out, source)), ("balance", lambda: curate.balance(out, given.cap))):
            rows[name] = {"s": timed(work)[1]}
    held = sum(map(len, matches)) / len(captions)
    print(f"\n{len(asked):,} queries, {len(captions):,} captions, {held:.1f} matches in each{' (--quick: these figures mean nothing)' * given.quick}\n")
    print("| | captions a second | built in s | memory in MB |\n|---|---|---|---|")
    for name, row in rows.items():
        row["captions_per_s"] = len(captions) / row["s"]
        print(f"| {name} | {row['captions_per_s']:,.0f} | " + (f"{row['build_s']:.2f} | {row['memory_mb']:.0f} |" if "build_s" in row else "| |"))
    found = {"benchmark": "curate", "settings": vars(given), "machine": machine, "versions": paired.versions(*PEERS), "sides": rows, "matches": held}
    paired.conditions(found)
    paired.write(given, found)


if __name__ == "__main__":
    main()
