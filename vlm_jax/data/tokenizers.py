"""Tokenizers with one interface: CLIP's byte-level BPE, SentencePiece, and any ``tokenizer.json``.

``load(name)`` opens one; ``save(dir)`` writes a self-contained directory that ``load(dir)`` reads, so that a
checkpoint carries its tokenizer. To train SentencePiece on a data set's own captions:
``python -m vlm_jax.data.tokenizers train --input=FILE_OR_SPEC --vocab=4000 --out=DIR``.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from vlm_jax.errors import nearest

DESCRIPTION = "tokenizer_kind.json"  # in a saved directory: {"kind": ...}
CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
BYTES_FROM = 1000
WORDS_KEPT = 2**16       # ids of words that CLIP's tokenizer remembers
CLIP_PACKAGES = ("open_clip", "clip")
SCENES = ("scenes", "scenes_instruct")
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")


class Tokenizer:
    """Text to ids and back.

    ``bos_id`` and ``eos_id`` are None where the vocabulary has none; ``pad_id`` is always a valid row of the table.
    """
    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None

    @property
    def continuing(self) -> list[int]:
        """Ids of pieces that go on with the word before them; none where the vocabulary does not tell."""
        return []

    def encode(self, text: str) -> list[int]:
        """All ids of a text, begin and end included, not shortened."""
        raise NotImplementedError

    def body(self, text: str) -> list[int]:
        """The ids of a text alone, without begin and end."""
        return self.encode(text)[1:-1]

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What ``encode`` puts before the ids of a text alone, and behind them."""
        whole, own = self.encode("a"), self.body("a")
        at = next(i for i in range(len(whole)) if whole[i:i + len(own)] == own)
        return whole[:at], whole[at + len(own):]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are dropped, and so is what follows the first end."""
        raise NotImplementedError

    def _files(self) -> dict[str, bytes]:
        raise NotImplementedError

    def __reduce__(self):
        return type(self), tuple(self._files().values())      # each is made of its file

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids int32 [n, length] padded on the right, mask bool [n, length] True where real, texts cut short).

        A text that is too long keeps its first ids and ends in ``eos_id`` all the same.
        """
        rows = [self.encode(text) for text in texts]
        cut = [row for row in rows if len(row) > length]
        for row in cut:
            del row[length:]
            if self.eos_id is not None:
                row[-1] = self.eos_id
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        mask = np.arange(length) < np.array([len(row) for row in rows], np.int64)[:, None]
        ids[mask] = list(itertools.chain.from_iterable(rows))
        return ids, mask, len(cut)

    def fingerprint(self) -> str:
        """Equal for tokenizers of the same files."""
        told = hashlib.sha256(self.kind.encode())
        for name, content in sorted(self._files().items()):
            told.update(name.encode() + content)
        return told.hexdigest()

    def save(self, folder: str) -> None:
        """Writes everything that ``load(folder)`` needs."""
        os.makedirs(folder, exist_ok=True)
        for name, content in {**self._files(), DESCRIPTION: json.dumps({"kind": self.kind}).encode()}.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)

    def _until_end(self, ids: Iterable[int]) -> list[int]:
        """The ids before the first end, without padding and begin. An id 0 that is also a token stays out of it."""
        out, ids = [], [int(i) for i in ids]
        for i in ids[1:] if ids[:1] == [self.bos_id] else ids:      # OPT begins with what is also its end
            if i == self.eos_id:
                break
            if i != self.bos_id:
                out.append(i)
        else:
            while out and out[-1] == self.pad_id:
                out.pop()
        return out


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Begin and end are added where the model has them (T5: end alone).
    A model without a pad id (Llama) pads with its unknown id; masks tell the two apart."""
    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        p = self._processor
        self.vocab_size = p.vocab_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (p.bos_id(), p.eos_id()))
        self.pad_id = p.pad_id() if p.pad_id() >= 0 else p.unk_id()

    @property
    def continuing(self) -> list[int]:
        p = self._processor
        return [i for i in range(self.vocab_size) if not (p.is_control(i) or p.is_unknown(i) or p.id_to_piece(i).startswith("\u2581"))]

    def encode(self, text: str) -> list[int]:
        return [*([] if self.bos_id is None else [self.bos_id]), *self.body(text), *([] if self.eos_id is None else [self.eos_id])]

    def body(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([i for i in self._until_end(ids) if i < self.vocab_size])     # a model's table may be longer

    def _files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}


class XlmrTokenizer(Tokenizer):
    """A SentencePiece model whose ids are counted as XLM-R's: <s> 0, <pad> 1, </s> 2, <unk> 3, then the pieces, which stand one place after
    where the model has them, and <mask> last."""
    kind = "xlmr"

    def __init__(self, model: bytes):
        import sentencepiece
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = 0, 1, 2, 3
        self.mask_id = self._processor.vocab_size() + 1
        self.vocab_size = self.mask_id + 1

    def encode(self, text: str) -> list[int]:
        unknown = self._processor.unk_id()
        return [self.bos_id, *(self.unk_id if i == unknown else i + 1 for i in self._processor.encode(text)), self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([i - 1 for i in self._until_end(ids) if self.unk_id < i < self.mask_id])     # a model's table may be longer

    def _files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}


class ClipTokenizer(Tokenizer):
    """CLIP's byte-level BPE on cleaned, lower-cased text (the CLIP release's ``simple_tokenizer``): 256 byte
    symbols, the same with "</w>", the file's first 48,894 merges (or fewer, in a small one), begin and end
    (49406 and 49407); pads with 0.

    The names of the special tokens inside a caption are plain text (OpenAI's own tokenizer makes ids of them).
    Cleaning is ftfy (where installed: without it, text with broken encodings gives other ids than the release;
    ``cleans_with_ftfy`` says which), HTML entities twice, single spaces, lower case.
    """
    kind = "clip"
    MERGES = 48894

    def __init__(self, vocabulary: bytes):
        import tokenizers
        self._vocabulary = vocabulary
        lines = gzip.decompress(vocabulary).decode("utf-8").split("\n")[1:self.MERGES + 1]
        self._merges = merges = [tuple(line.split()) for line in lines if line]
        wrong = next((i for i, m in enumerate(merges) if len(m) != 2), None)
        if wrong is not None:
            raise ValueError(f"line {wrong + 2} of {CLIP_FILE} is no merge of two: {lines[wrong]!r}")
        symbols = list(_byte_symbols().values())
        tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges),
                  "<|startoftext|>", "<|endoftext|>"]
        vocab = {token: i for i, token in enumerate(tokens)}
        self.vocab_size, self.pad_id = len(tokens), 0
        self.bos_id, self.eos_id = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        self._tokens, self._vocab = tokens, vocab
        self._bytes = {" ": 32, **{symbol: byte for byte, symbol in _byte_symbols().items()}}
        # the tokenizers library does the merging (Rust); its pre-tokenizer splits as the release's pattern does
        model = tokenizers.models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>")
        self._bpe = tokenizers.Tokenizer(model)
        pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        self._known: dict[str, list[int]] = {}
        self._fix = _ftfy()
        self.cleans_with_ftfy = self._fix is not None

    def clean(self, text: str) -> str:
        """The text as the BPE sees it."""
        if self._fix and not (text.isascii() and text.isprintable() and "&" not in text):  # ftfy leaves such text alone
            text = self._fix(text)
        return " ".join(html.unescape(html.unescape(text)).split()).lower()

    def encode(self, text: str) -> list[int]:
        ids = [self.bos_id]
        for word in self.clean(text).split():       # no merge crosses a space: a word's ids are the same in every text
            known = self._known.get(word)
            if known is None:
                known = self._bpe.encode(word).ids
                if len(self._known) < WORDS_KEPT:
                    self._known[word] = known
            ids += known
        ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text = "".join(self._tokens[i] for i in self._until_end(ids) if i < self.bos_id)
        data = bytearray(self._bytes[c] for c in text.replace("</w>", " "))
        return data.decode("utf-8", errors="replace").strip()

    def vocabulary(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """(token -> id, merges), as vocab.json and merges.txt hold them."""
        return dict(self._vocab), list(self._merges)

    def _files(self) -> dict[str, bytes]:
        return {CLIP_FILE: self._vocabulary}


def clip_json(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> str:
    """A tokenizer.json with transformers' own cleaning for CLIP: NFC, single spaces, lower case; begin and end added.

    It differs from ``ClipTokenizer`` where ftfy or HTML entities matter. Raises ValueError without the two special tokens.
    """
    import tokenizers as library
    begin, end = "<|startoftext|>", "<|endoftext|>"
    missing = [t for t in (begin, end) if t not in vocabulary]
    if missing:
        raise ValueError(f"the vocabulary lacks {missing[0]}")
    model = library.models.BPE(vocabulary, list(merges), unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>")
    out = library.Tokenizer(model)
    out.add_special_tokens([begin, end])
    out.normalizer = library.normalizers.Sequence([
        library.normalizers.NFC(), library.normalizers.Replace(library.Regex(r"\s+"), " "), library.normalizers.Lowercase()])
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    out.pre_tokenizer = library.pre_tokenizers.Sequence([
        library.pre_tokenizers.Split(library.Regex(pattern), "removed", invert=True),
        library.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    out.decoder = library.decoders.ByteLevel()
    out.post_processor = library.processors.RobertaProcessing((end, vocabulary[end]), (begin, vocabulary[begin]), False, False)
    return out.to_str()


def _byte_symbols() -> dict[int, str]:
    """Byte -> character, in the vocabulary's order (GPT-2's table): printable bytes stand for themselves,
    the rest count from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def _ftfy():
    try:
        import ftfy
    except ImportError:
        return None
    return ftfy.fix_text


class JsonTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json`` (BERT's WordPiece, RoBERTa's BPE ...), read by the ``tokenizers`` library.

    Special ids are the first of the usual names that the vocabulary has; the file's post-processor
    decides which are added to a text, and what it puts in front is the begin (OPT: "</s>").
    """
    kind = "json"
    NAMES = {"pad_id": ("[PAD]", "<pad>", "<|endoftext|>", "</s>", "<|end_of_text|>"),
             "bos_id": ("[CLS]", "<s>", "<bos>", "<|startoftext|>", "<|begin_of_text|>"),
             "eos_id": ("[SEP]", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
             "mask_id": ("[MASK]", "<mask>")}

    def __init__(self, content: bytes):
        import tokenizers
        self._content = content
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        found = {field: next((vocabulary[n] for n in names if n in vocabulary), None)
                 for field, names in self.NAMES.items()}
        self.bos_id, self.eos_id, self.mask_id = found["bos_id"], found["eos_id"], found["mask_id"]
        first = self._tokenizer.encode("a").tokens[:1]
        if first and first[0] in self.NAMES["eos_id"]:
            self.bos_id = vocabulary[first[0]]
        self.pad_id = found["pad_id"] if found["pad_id"] is not None else 0

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def body(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        text = self._tokenizer.decode(self._until_end(ids), skip_special_tokens=True)
        end = getattr(self._tokenizer.model, "end_of_word_suffix", None)     # the library's decoder leaves CLIP's "</w>"
        return text.replace(end, " ").strip() if end else text

    @property
    def continuing(self) -> list[int]:
        prefix = getattr(self._tokenizer.model, "continuing_subword_prefix", None)
        return sorted(i for piece, i in self._tokenizer.get_vocab().items() if piece.startswith(prefix) and piece != prefix) if prefix else []

    def content(self) -> str:
        return self._content.decode("utf-8")

    def special_tokens(self) -> dict[str, str]:
        """{"bos_token": "<s>", ...}, as tokenizer_config.json has them."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: self._tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._content}


KINDS = {"sentencepiece": (SentencePieceTokenizer, "sentencepiece.model"), "xlmr": (XlmrTokenizer, "sentencepiece.model"), "clip": (ClipTokenizer, CLIP_FILE),
         "json": (JsonTokenizer, "tokenizer.json")}


def load(name: str) -> Tokenizer:
    """Opens "scenes" (of captions and questions), "scenes_instruct" (with the words of instructions), "clip", "clip:PATH",
    "sentencepiece:PATH.model", "xlmr:PATH.model" (the same with XLM-R's ids), "hf:PATH or hub id", "bert:VOCAB.txt" (a word-piece vocabulary, lower
    case), or a directory written by ``save``.

    "clip" looks for the vocabulary inside an installed open_clip_torch or clip (which is not imported). A hub id is
    fetched through huggingface_hub where that is installed. Raises FileNotFoundError saying what is missing
    and how to get it, ValueError for a name that is none of these.
    """
    if os.path.isdir(name):
        return _load_saved(name)
    kind, colon, path = name.partition(":")
    path = os.path.expanduser(path)
    if name in SCENES:
        return SentencePieceTokenizer(_read(os.path.join(ASSETS, f"{name}.model"), "the scenes' packaged tokenizer"))
    if kind == "clip":
        return ClipTokenizer(_read(path, "CLIP's vocabulary") if path else _find_clip_vocabulary())
    if kind == "sentencepiece" and path:
        return SentencePieceTokenizer(_read(path, "the SentencePiece model"))
    if kind == "xlmr" and path:
        return XlmrTokenizer(_read(path, "the SentencePiece model"))
    if kind == "hf" and path:
        return JsonTokenizer(_read_json(path))
    if kind == "bert" and path:
        return JsonTokenizer(_word_pieces(_read(path, "BERT's vocabulary")))
    valid = (*SCENES, "clip", "clip:PATH", "sentencepiece:PATH", "xlmr:PATH", "hf:PATH", "bert:VOCAB.txt", "a directory written by save")
    raise ValueError(f"tokenizer {name!r} is neither a known name nor a directory{nearest(name, valid)}")


def _word_pieces(vocabulary: bytes) -> bytes:
    """A line-by-line vocabulary -> the tokenizer.json of bert-base-uncased with it."""
    import tokenizers
    words = {word: i for i, word in enumerate(vocabulary.decode("utf-8").rstrip("\n").split("\n"))}
    return tokenizers.BertWordPieceTokenizer(words, lowercase=True).to_str().encode()


def _load_saved(folder: str) -> Tokenizer:
    try:
        kind = json.loads(_read(os.path.join(folder, DESCRIPTION), "a saved tokenizer's description"))["kind"]
    except FileNotFoundError:
        if os.path.isfile(os.path.join(folder, "tokenizer.json")):
            return JsonTokenizer(_read_json(folder))
        raise
    if kind not in KINDS:
        raise ValueError(f"{folder} holds a tokenizer of kind {kind!r}{nearest(kind, KINDS)}")
    make, file = KINDS[kind]
    return make(_read(os.path.join(folder, file), f"the {kind} tokenizer's file"))


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{what} is not at {path}") from None


def _find_clip_vocabulary() -> bytes:
    for package in CLIP_PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if os.path.isfile(os.path.join(folder, CLIP_FILE)):
                return _read(os.path.join(folder, CLIP_FILE), "CLIP's vocabulary")
    raise FileNotFoundError(f"the tokenizer 'clip' needs {CLIP_FILE}, which no installed package "
                            f"({' or '.join(CLIP_PACKAGES)}) holds: install open_clip_torch, or name the file: "
                            f"'clip:/path/{CLIP_FILE}'")


def _read_json(path: str) -> bytes:
    if os.path.isdir(path):
        path = os.path.join(path, "tokenizer.json")
    if os.path.exists(path) or path.endswith(".json") or path.startswith((".", "/")):
        return _read(path, "the tokenizer file")
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(f"hf:{path} is no file here, and fetching it from the hub needs huggingface_hub "
                                f"(pip install huggingface_hub)") from None
    return _read(huggingface_hub.hf_hub_download(path, "tokenizer.json"), "the tokenizer file")


def train(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> SentencePieceTokenizer:
    """Trains SentencePiece on captions: NFKC, lower case; pad 0, begin 1, end 2, unknown 3.

    ``vocab_size`` is an upper limit: few captions give fewer pieces. From ``BYTES_FROM`` on, 256 of them are
    bytes, which stand in for characters not seen; a smaller vocabulary has none to spare. ``model_type``: "bpe"
    makes whole words of a small corpus, "unigram" cuts them finer. The same texts give the same model.
    Raises ValueError where the limit does not hold the texts' characters.
    """
    import sentencepiece
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=vocab_size, model_type=model_type,
            hard_vocab_limit=False, character_coverage=1.0, byte_fallback=vocab_size >= BYTES_FROM,
            normalization_rule_name="nmt_nfkc_cf", pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1,
            input_sentence_size=1_000_000, shuffle_input_sentence=False, minloglevel=2)
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"SentencePiece cannot be trained with vocab={vocab_size}: {reason}") from None
    return SentencePieceTokenizer(out.getvalue())


def captions(name: str, limit: int, caption: str | None) -> Iterable[str]:
    """Up to ``limit`` captions of a text file (one a line) or a data source, spread over it evenly."""
    if os.path.isfile(name):
        with open(name, encoding="utf-8") as file:
            for _, line in zip(range(limit), file):
                yield line.rstrip("\n")
        return
    from vlm_jax.data.bad import BadSample
    from vlm_jax.data.sources import open_source, read_text
    source = open_source(name, caption=caption)
    for i in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(np.int64)):
        try:
            yield from read_text(source, int(i))
        except BadSample:
            continue


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.tokenizers")
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train SentencePiece on captions")
    train_parser.add_argument("--input", required=True, help="text file, one caption a line, or a data source")
    train_parser.add_argument("--vocab", type=int, default=4000, help="at most this many pieces")
    train_parser.add_argument("--out", required=True, help="directory to write")
    train_parser.add_argument("--caption", help="caption field of the source, as in data.caption")
    train_parser.add_argument("--model", default="bpe", choices=("bpe", "unigram"))
    train_parser.add_argument("--limit", type=int, default=1_000_000, help="captions to read")
    args = parser.parse_args(argv)
    try:
        tokenizer = train(captions(args.input, args.limit, args.caption), args.vocab, args.model)
        tokenizer.save(args.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    print(f"{args.out}: {tokenizer.vocab_size} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
