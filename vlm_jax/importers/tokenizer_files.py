"""Tokenizers beside official weights: found at import, written at export."""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.data import tokenizers
from vlm_jax.errors import ConfigError
from vlm_jax.importers.release import read_json

WORD_PIECES = ("albef", "albef_vqa", "albef_ve", "albef_nlvr", "blip", "blip_vqa", "blip_nlvr", "hf_bert", "hf_blip", "hf_blip_vqa", "vlmo", "blip2", "blip2_clip", "hf_blip2")      # bert-base-uncased's
XLMR = {"beit3": "beit3.spm"}      # releases whose ids are XLM-R's, of the SentencePiece model of that name; their tables are padded
LANGUAGE = {"hf_opt": "", "hf_llama": "tokenizer.model", "hf_t5": "spiece.model"}      # language models, and their SentencePiece files
HUGGING_FACE = ("hf_clip",)      # releases whose official ids are the directory's own tokenizer's


def find(release: str, folder: pathlib.Path, given: str, tokens: Mapping[str, int], end: str, say: Callable[[str], None]) -> Any:
    """The tokenizer of an import, or None. ``given`` is the command line's; its misfit is an error, while one
    that was merely found is left out, and ``say`` tells why. A model that pools at its end id (``end`` "eos") needs
    the tokenizer's to be the same."""
    def misfit(found):
        if end == "eos" and found.eos_id != tokens["eos"]:
            return f"ends texts with id {found.eos_id}, the model pools at id {tokens['eos']}"
        return ""
    if given:
        try:
            found = tokenizers.load(given)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"--tokenizer: {error}") from error
        if found.vocab_size > tokens["vocab"]:
            raise ConfigError(f"--tokenizer={given!r} has {found.vocab_size} ids, the model's table {tokens['vocab']}; nearest: leave it out")
        if misfit(found):
            raise ConfigError(f"--tokenizer={given!r} {misfit(found)}; nearest: leave it out")
        return found
    try:
        found, name = beside(release, folder)
    except (FileNotFoundError, ValueError) as error:
        say(f"no tokenizer: {error}. Ids work; for strings import again with --tokenizer")
        return None
    own = len(set(tokens) - {"vocab", "bos", "eos", "pad", "mask"})     # ids after the tokenizer's, such as BLIP's [DEC] and [ENC]
    fits = (found.vocab_size <= tokens["vocab"] if release in LANGUAGE else
            found.vocab_size + own == tokens["vocab"] or release in XLMR and found.mask_id == tokens["mask"])
    why = misfit(found) or ("" if fits else f"has {found.vocab_size} ids, the model's table {tokens['vocab']}")
    if why:
        say(f"no tokenizer: {name} {why}. Ids work; for strings import again with --tokenizer")
        return None
    return found


def beside(release: str, folder: pathlib.Path) -> tuple[Any, str]:
    """(the tokenizer of the release's own code, its name). Raises FileNotFoundError, ValueError."""
    if release in HUGGING_FACE:
        for name, opened in (("tokenizer.json", open_json), ("vocab.json", open_vocabulary)):
            if (folder / name).is_file():
                return opened(folder), name
        return tokenizers.load("clip"), "CLIP's vocabulary"
    if release in XLMR:
        if not (folder / XLMR[release]).is_file():
            raise FileNotFoundError(f"there is no {XLMR[release]} beside the file")
        return tokenizers.load(f"xlmr:{folder / XLMR[release]}"), XLMR[release]
    if release in LANGUAGE:      # tables are longer than vocabularies
        if (folder / "tokenizer.json").is_file():
            return open_json(folder), "tokenizer.json"
        if LANGUAGE[release] and (folder / LANGUAGE[release]).is_file():
            return tokenizers.load(f"sentencepiece:{folder / LANGUAGE[release]}"), LANGUAGE[release]
        if release == "hf_opt" and (folder / "vocab.json").is_file():
            return open_opt_vocabulary(folder), "vocab.json"
        other = LANGUAGE[release] or "vocab.json with merges.txt"
        raise FileNotFoundError(f"there is no tokenizer.json or {other} beside the file")
    if release in WORD_PIECES:
        if (folder / "vocab.txt").is_file():
            return tokenizers.load(f"bert:{folder / 'vocab.txt'}"), "vocab.txt"
        if (folder / "tokenizer.json").is_file():
            return open_json(folder), "tokenizer.json"
        raise FileNotFoundError("there is no vocab.txt of bert-base-uncased beside the file")
    if read_json(folder, "open_clip_config.json").get("model_cfg", {}).get("text_cfg", {}).get("hf_tokenizer_name"):
        return open_json(folder), "tokenizer.json"
    if (folder / tokenizers.CLIP_FILE).is_file():
        return tokenizers.load(f"clip:{folder / tokenizers.CLIP_FILE}"), tokenizers.CLIP_FILE
    try:
        return tokenizers.load("clip"), "CLIP's vocabulary"
    except FileNotFoundError:
        if (folder / "merges.txt").is_file():
            return tokenizers.ClipTokenizer(gzip.compress((folder / "merges.txt").read_bytes(), mtime=0)), "merges.txt"
        raise


OF_INSTRUCTIONS = "qformer_tokenizer"      # transformers' folder of the tokenizer of what queries read


def of_instructions(folder: pathlib.Path, tokens: Mapping[str, int], say: Callable[[str], None]) -> Any:
    """The tokenizer of the words that a Q-Former reads, from its own folder or the vocab.txt of bert-base-uncased beside the file; None without one."""
    own = folder / OF_INSTRUCTIONS
    try:
        found, name = beside("hf_bert", own if own.is_dir() else folder) if own.is_dir() or (folder / "vocab.txt").is_file() else (None, "")
    except (FileNotFoundError, ValueError) as error:
        say(f"no tokenizer of instructions: {error}")
        return None
    if found is None or found.vocab_size > tokens["vocab"]:
        say("no tokenizer of instructions: " + (f"{name} has {found.vocab_size} ids, the Q-Former's table {tokens['vocab']}" if found else
                                                f"there is no {OF_INSTRUCTIONS}/ and no vocab.txt of bert-base-uncased beside the file"))
        return None
    return found


def open_json(folder: pathlib.Path) -> tokenizers.JsonTokenizer:
    return tokenizers.load(f"hf:{folder / 'tokenizer.json'}")


def open_vocabulary(folder: pathlib.Path) -> tokenizers.JsonTokenizer:
    """CLIPTokenizer's vocab.json and merges.txt. Its text normalisation: NFC, single spaces, lower case."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return tokenizers.JsonTokenizer(tokenizers.clip_json(vocabulary, merges).encode())


def open_opt_vocabulary(folder: pathlib.Path) -> tokenizers.JsonTokenizer:
    """OPT's vocab.json and merges.txt: GPT-2's byte pairs, behind "</s>"."""
    import tokenizers as library

    pairs = library.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    pairs.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    pairs.post_processor = library.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", pairs.token_to_id("</s>"))])
    return tokenizers.JsonTokenizer(pairs.to_str().encode())


def write(release: str, tokenizer: Any, length: int, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """The tokenizer as Hugging Face's loaders read it. open_clip's own needs none for CLIP's vocabulary."""
    if tokenizer is None:
        say("no tokenizer is written: the model came without one")
        return
    if tokenizer.kind == "clip":
        vocabulary, merges = tokenizer.vocabulary()
        content = tokenizers.clip_json(vocabulary, merges)
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
        special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
        config = dict(tokenizer_class="CLIPTokenizer", model_max_length=length, do_lower_case=True, errors="replace", **special)
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    elif tokenizer.kind == "json":
        content = tokenizer.content()
        config = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=length, **tokenizer.special_tokens())
    else:
        tokenizer.save(str(folder / "tokenizer"))
        say(f"the {tokenizer.kind} tokenizer lies in tokenizer/: the layout {release} has no form for it")
        return
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
