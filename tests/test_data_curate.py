"""CLIP's data collection: what is asked for, which texts hold it, what is kept, and that no way of running changes it."""

import collections
import gzip
import io
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from vlm_jax.data import curate, queries
from vlm_jax.data.sources import open_source
from vlm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))


def write_tar(path, samples):
    """samples: {key: caption, or {extension: bytes}}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            if isinstance(members, str):
                members = {"jpg": f"image of {key}".encode(), "txt": members.encode()}
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


WORDS = ["a", "photo", "of", "the", "dog", "cat", "New York", "York", "fox", "zq1", "zq2"]    # by falling weight


def captions(n, seed=0):
    rng = random.Random(seed)
    weights = [64, 64, 32, 16, 8, 8, 4, 4, 2, 40, 40]
    return {f"k{i:05}": " ".join(rng.choices(WORDS, weights, k=rng.randint(1, 4))) for i in range(n)}


QUERIES = ["a", "photo", "of", "the", "dog", "cat", "New York", "fox", "unicorn", "a photo", "the cat"]


def pool(folder, samples, tars=3):
    """The samples over some tars; the pattern."""
    items = list(samples.items())
    for i in range(tars):
        write_tar(folder / f"s-{i:05}.tar", dict(items[i::tars]))
    return f"tars:{folder}/s-*.tar"


def run(*args):
    assert curate.main([str(a) for a in args]) == 0


def begin(folder, asked=QUERIES):
    (folder / "list.txt").write_text("\n".join(asked))
    run("queries", f"--list={folder}/list.txt", f"--out={folder}/out")


@pytest.fixture
def matched(tmp_path):
    """A matched pool of 300 pairs in three tars."""
    begin(tmp_path)
    run("match", f"--input={pool(tmp_path, captions(300))}", f"--out={tmp_path}/out")
    return tmp_path


def kept(folder, cap, seed=0):
    return {key for path in sorted((folder / f"out/cap_{cap}_seed_{seed}").rglob("*.tar")) for key in keys(path)}


def keys(path):
    with tarfile.open(path) as tar:
        return {m.name.partition(".")[0] for m in tar}


def naive(text, asked=QUERIES):
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    text = f" {' '.join(text.split())} "
    return [i for i, query in enumerate(asked) if f" {query} " in text]


# ---- which queries a text holds ----------------------------------------------------------------

def test_matches_as_a_search_for_each_query_does():
    rng = random.Random(1)
    words = ["a", "b", "ab", "A", "ç", "b-a", "(a)", "'", "."]
    asked = list(dict.fromkeys(" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(300)))
    match, held = queries.Matcher(asked), 0
    for _ in range(400):
        text = "".join(rng.choice(words) + rng.choice([" ", "  ", "\t", "\n", ",", ". ", "!", "` ", "-", ""]) for _ in range(rng.randint(0, 12)))
        assert match([text]) == naive(text, asked), text
        held += len(match([text]))
    assert held > 1000


def test_rules_of_matching():
    def found(text, *asked):
        return [asked[i] for i in queries.Matcher(asked)([text])]

    assert found("A cat.", "a", "cat", "A") == ["cat", "A"]                                  # case counts
    assert found("red\tcar\non:the;road?yes!a`b,c", "red car", "on", "the", "road", "yes", "a", "b", "c") == \
        ["red car", "on", "the", "road", "yes", "a", "b", "c"]
    assert found("cat, dog", "cat dog") == [] and found("cats", "cat") == [] and found("cat", "cat dog") == []
    assert found("(cat) \"dog\" it's", "cat", "dog", "it") == []                             # other marks belong to their word
    assert found("one two three four", "two three", "one two three four", "two", "three two", "four") == \
        ["two three", "one two three four", "two", "four"]                                   # overlapping ones too
    assert found("dog dog dog", "dog", "dog dog") == ["dog", "dog dog"]                      # once each
    assert queries.Matcher(["x", "y"])(["y", "x y"]) == [0, 1] and queries.Matcher([])(["x"]) == []


def test_a_query_with_marks_is_listed_as_texts_are_read(tmp_path):
    begin(tmp_path, ["St. Louis", "  New   York ", "", "New York", "what?"])
    assert queries.read(tmp_path / "out/queries.tsv") == ["St . Louis", "New York", "what ?"]
    assert queries.Matcher(queries.read(tmp_path / "out/queries.tsv"))(["St. Louis: what?"]) == [0, 2]


# ---- the list ----------------------------------------------------------------------------------

CORPUS = ["the hot dog ate the hot dog, dog hot", "New York", "the New York", "the dog", "हिन्दी \"quoted\" don't 42"]


def test_words_bigrams_and_lists_are_counted(tmp_path):
    # words: the 4, hot 3, dog 4, ate 1, New 2, York 2, हिन्दी 1, don't 1, 42 1: 19 in all
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    (tmp_path / "list.txt").write_text("sea horse\ndog\nate\nNew York\nsea horse\n")
    run("queries", f"--corpus={tmp_path}/corpus.txt", f"--list={tmp_path}/list.txt", f"--out={tmp_path}/a",
        "--word_count=3", "--pmi=1.4", "--bigram_count=2")
    lines = [line.split("\t") for line in (tmp_path / "a/queries.tsv").read_text().splitlines()]
    assert lines == [["dog", "4", "word,list"], ["the", "4", "word"], ["hot", "3", "word"],
                     ["New York", "2", "bigram,list"], ["hot dog", "2", "bigram"], ["the hot", "2", "bigram"],
                     ["sea horse", "", "list"], ["ate", "1", "list"]]
    pmi = {b: math.log2(n * 19 / (x * y)) for b, n, x, y in (("New York", 2, 2, 2), ("hot dog", 2, 3, 4), ("the hot", 2, 4, 3))}
    assert min(pmi.values()) >= 1.4 and math.log2(1 * 19 / (4 * 4)) < 1.4      # "the dog" is rarer too
    words = queries.count_words(CORPUS)
    assert words.total() == 19 and words["हिन्दी"] == words["don't"] == words["42"] == 1 and "\"quoted\"" not in words
    for bigram, value in pmi.items():       # at its PMI a bigram is in, above it out
        assert bigram in queries.count_bigrams(CORPUS, words, value - 1e-9, 1) and bigram not in queries.count_bigrams(CORPUS, words, value + 1e-9, 1)


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_bigrams_equal_a_plain_count(monkeypatch, chunk):
    monkeypatch.setattr(queries, "CHUNK", chunk)
    rng = random.Random(2)
    corpus = [" ".join(rng.choices("a b c d e f g h ( .".split(), [40, 20, 10, 6, 4, 3, 2, 1, 8, 8], k=9)) for _ in range(80)]
    words = queries.count_words(corpus)
    assert words == collections.Counter(w for line in corpus for w in line.split() if w not in "(.")
    pairs = collections.Counter((x, y) for line in corpus for x, y in itertools.pairwise(line.split()) if x not in "(." and y not in "(.")
    for pmi, least in ((-9, 1), (0, 1), (.5, 3), (2, 1), (3, 2)):
        plain = {f"{x} {y}": n for (x, y), n in pairs.items()
                 if n >= least and math.log2(n * words.total() / (words[x] * words[y])) >= pmi}
        assert queries.count_bigrams(corpus, words, pmi, least) == plain and (plain or pmi == 3)


def test_the_list_is_the_same_each_time_and_says_what_is_out_of_reach(tmp_path, capsys):
    source = pool(tmp_path / "p", captions(60))
    for out in "ab":
        run("queries", f"--corpus={source}", f"--out={tmp_path}/{out}", "--word_count=5")
    assert (tmp_path / "a/queries.tsv").read_bytes() == (tmp_path / "b/queries.tsv").read_bytes()
    n = sum(len(text.split()) for text in captions(60).values())
    assert f"can reach {math.log2(n / 2):.1f}" in capsys.readouterr().out
    assert "photo" in queries.read(tmp_path / "a/queries.tsv")


# ---- what is kept ------------------------------------------------------------------------------

def test_a_cap_above_every_count_keeps_all_that_match_and_nothing_else(matched):
    run("balance", f"--out={matched}/out", "--cap=300")
    samples = captions(300)
    wanted = {key for key, text in samples.items() if naive(text)}
    assert 0 < len(wanted) < 300 and kept(matched, 300) == wanted
    source = open_source(f"tars:{matched}/out/cap_300_seed_0/s-*.tar")      # indexed, and read as any other
    assert all(os.path.exists(path + ".idx") for path in source.paths) and len(source) == len(wanted)
    for i in range(len(source)):
        sample, key = source[i], source.key(i).partition("/")[2]
        assert sample["text"] == [samples[key]] and sample["image"] == f"image of {key}".encode()
        assert key in keys(f"{matched}/{source.key(i).partition('/')[0]}.tar")       # same tar, same key


def pairs_of(rows):
    return [curate.Pair(str(i), int(curate.hash64(7, i)), list(numbers), {}) for i, numbers in enumerate(rows)]


def test_a_head_query_keeps_about_the_cap_and_a_tail_query_all():
    rows = [[0]] * 20_000 + [[1]] * 5000 + [[0, 1]] * 5000 + [[2]] * 400 + [[0, 3]] * 50
    pairs = pairs_of(rows)
    counts = curate.count(pairs, 5)
    assert counts.tolist() == [25_050, 10_000, 400, 50, 0]
    cap, found = 500, []
    for seed in range(8):
        stays = [pair.queries for pair in curate.keep(pairs, counts, cap, seed)]
        assert sum(q in ([2], [0, 3]) for q in stays) == 450       # below the cap: never dropped
        found.append([stays.count([0]), stays.count([1]), stays.count([0, 1])])
    p = cap / counts[:2]
    expected = np.array([20_000 * p[0], 5000 * p[1], 5000 * (1 - (1 - p[0]) * (1 - p[1]))])      # independent draws
    assert np.all(np.abs(np.mean(found, 0) - expected) < 5 * np.sqrt(expected / 8))
    assert np.all(np.abs(np.array(found) - expected) < 5 * np.sqrt(expected))
    # the successes of a head query itself, over all its pairs, are the cap in expectation
    hashes = np.array([pair.hash for pair in pairs if 0 in pair.queries], np.uint64)
    successes = np.array([(curate.draw(seed, hashes, np.zeros(len(hashes), np.int64)) < p[0]).sum() for seed in range(8)])
    assert abs(successes.mean() - cap) < 5 * math.sqrt(cap / 8) and np.abs(successes - cap).max() < 5 * math.sqrt(cap)


def test_draws_are_uniform_and_independent_of_each_other():
    hashes = curate.hash64(3, np.arange(20_000))
    a, b = (curate.draw(0, hashes, np.full(20_000, number)) for number in (0, 1))
    c = curate.draw(1, hashes, np.zeros(20_000, np.int64))
    assert 0 <= a.min() and a.max() < 1
    for x in (a, b, c):
        assert np.abs(np.histogram(x, 10, (0, 1))[0] - 2000).max() < 5 * math.sqrt(2000)
    assert np.abs(np.corrcoef([a, b, c]) - np.eye(3)).max() < 5 / math.sqrt(20_000)


def test_a_larger_cap_keeps_what_a_smaller_one_keeps(matched):
    sets = []
    for cap in (5, 20, 60):
        run("balance", f"--out={matched}/out", f"--cap={cap}")
        sets.append(kept(matched, cap))
    assert sets[0] < sets[1] < sets[2]
    run("balance", f"--out={matched}/out", "--cap=20", "--seed=1")
    assert kept(matched, 20, 1) != sets[1]
    tail = {key for key, text in captions(300).items() if QUERIES.index("fox") in naive(text)}
    assert 5 < len(tail) <= 20 and tail <= sets[1] and tail <= kept(matched, 20, 1)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix not in (".idx", ".npz")}


def test_units_make_what_one_process_makes_and_other_tars_the_same_set(matched):
    run("balance", f"--out={matched}/out", "--cap=20")
    begin(matched / "units" if (matched / "units").mkdir() is None else None)
    source = f"tars:{matched}/s-*.tar"
    for unit in (2, 0, 1):
        run("match", f"--input={source}", f"--out={matched}/units/out", f"--shards={unit}/3")
    for unit in (1, 2, 0):
        run("balance", f"--out={matched}/units/out", "--cap=20", f"--shards={unit}/3")
    run("report", f"--out={matched}/units/out", "--cap=20")
    assert contents(matched / "out") == contents(matched / "units/out")
    counts = [np.load(matched / f"units/out/match/counts-{unit}-of-3.npz")["counts"] for unit in range(3)]
    assert all(c.dtype == np.int64 for c in counts)
    assert sum(counts).tolist() == np.load(matched / "out/match/counts-0-of-1.npz")["counts"].tolist()
    (matched / "other").mkdir()
    begin(matched / "other")        # the same pairs in other tars
    run("match", f"--input={pool(matched / 'other', captions(300), tars=5)}", f"--out={matched}/other/out")
    run("balance", f"--out={matched}/other/out", "--cap=20")
    assert kept(matched / "other", 20) == kept(matched, 20)


def killed_at(path, waits_for, *args):
    """Starts a command that stops to wait at ``path`` (a pipe that nobody writes to), and kills it once ``waits_for`` is there."""
    aside = path.with_name("aside")
    if path.exists():
        path.rename(aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    process = subprocess.Popen([sys.executable, "-m", "vlm_jax.data.curate", *map(str, args)], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not waits_for.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    path.unlink()
    if aside.exists():
        aside.rename(path)


def test_killed_between_tars_and_started_again_it_gives_the_same_bytes(matched):
    run("balance", f"--out={matched}/out", "--cap=20")
    whole = contents(matched / "out")
    shutil.rmtree(matched / "out/match"), shutil.rmtree(matched / "out/cap_20_seed_0")
    match = ["match", f"--input=tars:{matched}/s-*.tar", f"--out={matched}/out"]
    balance = ["balance", f"--out={matched}/out", "--cap=20"]
    second = matched / "out/match/s-00001.tar.jsonl"
    killed_at(second, matched / "out/match/s-00000.tar.jsonl", *match)
    assert not (matched / "out/match/counts-0-of-1.npz").exists()
    first = os.stat(matched / "out/match/s-00000.tar.jsonl").st_ino
    run(*match)
    target = matched / "out/cap_20_seed_0/s-00000.tar"
    killed_at(second, target, *balance)
    assert not (matched / "out/cap_20_seed_0/s-00001.tar").exists()
    copied = os.stat(target).st_ino
    (matched / "out/cap_20_seed_0/s-00001.tar.123-ab.tmp").write_bytes(b"half")       # killed while it wrote
    run(*balance)
    assert contents(matched / "out") == whole
    assert os.stat(matched / "out/match/s-00000.tar.jsonl").st_ino == first and os.stat(target).st_ino == copied      # found again


def test_a_tar_that_changed_is_matched_and_copied_again(matched, capsys):
    run("balance", f"--out={matched}/out", "--cap=300")
    target, samples = matched / "out/cap_300_seed_0/s-00001.tar", dict(list(captions(300).items())[1::3])
    os.utime(target, ns=(0, os.stat(target).st_mtime_ns - 10**9))
    write_tar(matched / "s-00001.tar", {key: {"jpg": b"another image", "txt": text.encode()} for key, text in samples.items()})
    assert curate.main(["balance", f"--out={matched}/out", "--cap=300"]) == 43
    assert "s-00001.tar has changed since it was matched" in capsys.readouterr().err
    run("match", f"--input=tars:{matched}/s-*.tar", f"--out={matched}/out")
    run("balance", f"--out={matched}/out", "--cap=300")
    source = open_source(f"tars:{target}")
    assert len(source) == sum(bool(naive(text)) for text in samples.values()) and {source[i]["image"] for i in range(len(source))} == {b"another image"}


# ---- the report --------------------------------------------------------------------------------

def test_report_tells_what_was_read_matched_and_kept(matched, capsys):
    capsys.readouterr()
    run("balance", f"--out={matched}/out", "--cap=40")
    samples, stays = captions(300), kept(matched, 40)
    before = np.bincount([q for text in samples.values() for q in naive(text)], minlength=len(QUERIES))
    after = np.bincount([q for key in stays for q in naive(samples[key])], minlength=len(QUERIES))
    found = json.loads((matched / "out/cap_40_seed_0/report.json").read_text())
    holding = sum(bool(naive(text)) for text in samples.values())
    assert found["pairs"] == {"read": 300, "matched": holding, "kept": len(stays)} and found["tars"] == 3
    assert found["matched_share"] == holding / 300 and found["matches_per_pair"] == before.sum() / holding
    over = before > 40
    assert over.sum() > 2 and found["queries"] == {"all": len(QUERIES), "unmatched": 1, "over_cap": over.sum()}
    assert found["over_cap_share_of_matches"] == before[over].sum() / before.sum()
    largest = [(row["query"], row["before"], row["after"]) for row in found["largest"]]
    assert largest == sorted(((q, b, a) for q, b, a in zip(QUERIES, before, after, strict=True) if b), key=lambda row: -row[1])
    table = (matched / "out/cap_40_seed_0/queries.tsv").read_text().splitlines()
    assert table == [f"{q}\t{b}\t{a}" for q, b, a in zip(QUERIES, before, after, strict=True)]
    told, text = capsys.readouterr().out, (matched / "out/cap_40_seed_0/report.txt").read_text()
    assert text in told and f"{before[1]:,}" in text and "over the cap of 40" in text


def test_bad_samples_are_left_out_and_counted(tmp_path):
    begin(tmp_path, ["dog", "Katze"])
    deep = tmp_path / "pool/part-0"
    write_tar(deep / "x.tar", {
        "none": {"txt": b"a dog"}, "mute": {"jpg": b"1"}, "latin": {"jpg": b"2", "txt": b"dog \xff"}, "empty": {"jpg": b"3", "txt": b"  "},
        "ok": {"JPG": b"4", "txt": b"a dog", "json": json.dumps({"titles": ["x", "eine Katze"]}).encode(), "npy": b"kept too"}, "no": "cat"})
    write_tar(tmp_path / "pool/part-1/x.tar", {"ok": "the dog", "é" * 90: "dog"})
    write_tar(tmp_path / "pool/part-1/void.tar", {"no": "cat"})
    run("match", f"--input=tars:{tmp_path}/pool/**/*.tar", f"--out={tmp_path}/out", "--caption=txt; json:titles@2")
    run("balance", f"--out={tmp_path}/out", "--cap=10")
    found = json.loads((tmp_path / "out/cap_10_seed_0/report.json").read_text())
    assert found["left_out"] == {"missing_image": 1, "missing_caption": 1, "caption_not_utf8": 1, "empty_caption": 1}
    assert found["pairs"] == {"read": 5, "matched": 3, "kept": 3}
    assert [(row["query"], row["before"]) for row in found["largest"]] == [("dog", 3), ("Katze", 1)]      # of any caption
    with tarfile.open(tmp_path / "out/cap_10_seed_0/part-0/x.tar") as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar if m.name != "ok.json"} == {"ok.jpg": b"4", "ok.txt": b"a dog", "ok.npy": b"kept too"}
        assert json.load(tar.extractfile("ok.json"))["titles"][1] == "eine Katze"
    source = open_source(f"tars:{tmp_path}/out/cap_10_seed_0/*/*.tar")      # an empty tar among them
    assert [source.key(i) for i in range(len(source))] == ["x/ok", "x/ok", "x/" + "é" * 90]


# ---- errors ------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, told", [
    ("match --input=tars:{p}/s-*.tar --out={p}/new", "holds no queries.tsv; run queries first"),
    ("balance --out={p}/new", "run match first"),
    ("match --input=tars:{p}/s-*.tar --out={p}/out --shards=3/3", "--shards='3/3' is no unit I/N with I from 0 to N-1; nearest: '2/3'"),
    ("match --input={p}/s-00000.tar --out={p}/out", "is not a source of tars; nearest: 'tars:{p}/s-00000.tar'"),
    ("match --input=tars:{p}/s-00009.tar --out={p}/out", "no tar {p}/s-00009.tar; nearest: 's-0000"),
    ("match --input=tars:{p}/s-*.tar;tars:{p}/s-00000.tar --out={p}/out", "names {p}/s-00000.tar twice"),
    ("match --input=tars:{p}/s-*.tar --out={p}/out --caption=json", "--caption='json'"),
    ("match --input=tars:{p}/s-*.tar --out={p}/out --caption=json:x", "--caption='json:x' is not what {p}/out/match was begun with ('txt')"),
    ("match --input=tars:{p}/s-00000.tar --out={p}/out", "--input (1 tars, "),
    ("balance --out={p}/out --cap=0", "--cap=0"),
    ("balance --out={p}/out --cap=many", "--cap: invalid int value: 'many'"),
    ("report --out={p}/out --cap=7", "run balance --cap=7 --seed=0 first"),
    ("blance --out={p}/out", "'blance'"),
    ("queries --out={p}/out", "--corpus and --list are missing"),
    ("queries --out={p}/out --list={p}/absent.txt", "{p}/absent.txt cannot be read"),
    ("queries --out={p}/out --corpus={p}/absent.txt", "--corpus={p}/absent.txt is neither"),
    ("queries --out={p}/new --corpus={p}/list.txt", "the most frequent, 'a', 2 times"),
    ("queries --out={p}/new --corpus={p}/list.txt --word_count=0", "--word_count=0 must be at least 1"),
])
def test_wrong_commands_end_with_43_and_say_why(matched, capsys, args, told):
    assert curate.main(args.format(p=matched).split(" ")) == 43
    assert told.format(p=matched) in capsys.readouterr().err


def test_wrong_data_ends_with_43_and_says_why(matched, capsys):
    def fails(*args):
        capsys.readouterr()
        assert curate.main([str(a) for a in args]) == 43
        return capsys.readouterr().err

    out = f"--out={matched}/out"
    run("match", f"--input=tars:{matched}/s-*.tar", out, "--shards=1/3")
    assert "lacks the counts of 2 of 3 units; run match with --shards=0/3, --shards=2/3" in fails("balance", out)
    (matched / "out/queries.tsv").write_text("dog\n")
    assert "queries.tsv is not what" in fails("match", f"--input=tars:{matched}/s-*.tar", out)
    assert "queries.tsv is not what" in fails("balance", out)
    shutil.rmtree(matched / "out/match")
    assert "--caption='text'; nearest: 'txt' (valid: jpg, txt)" in fails("match", f"--input=tars:{matched}/s-*.tar", out, "--caption=text")
    (matched / "g.tar").write_bytes(gzip.compress((matched / "s-00000.tar").read_bytes()))
    shutil.rmtree(matched / "out/match")
    assert "g.tar is compressed" in fails("match", f"--input=tars:{matched}/g.tar", out)
    (matched / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "latin.txt" in fails("queries", f"--list={matched}/latin.txt", out)
    assert "latin.txt" in fails("queries", f"--corpus={matched}/latin.txt", out)
    with pytest.raises(ConfigError, match="--pmi"):
        queries.build(None, {}, word_count=1, pmi=math.nan, bigram_count=1)


def test_the_benchmark_runs(capsys):
    from benchmarks import curate as benchmark
    benchmark.main(["--quick"])
    told = capsys.readouterr().out
    assert "queries, 500 captions" in told and "| match, tars |" in told and "| balance |" in told
