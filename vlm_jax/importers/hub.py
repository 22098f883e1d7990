"""The Hugging Face hub, through huggingface_hub (extra [hub]); HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold as everywhere.

Two steps, since a repository often holds the same gigabytes in several layouts: first what describes a model, then the
safetensors that the loader of its layout reads. Never a pickle, never code.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
from collections.abc import Sequence

from vlm_jax.errors import ConfigError
from vlm_jax.importers import read
from vlm_jax.importers.release import read_json

DESCRIPTIONS = ("config.json", "open_clip_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "bpe_simple_vocab_16e6.txt.gz",
                "README.md")      # its metadata tells the licence
WHOLE, INDEX = ".safetensors", ".safetensors.index.json"
LOG_IN = "log in (hf auth login, or HF_TOKEN), with a token that may do this"


def _library():
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError('hf: paths need huggingface_hub: pip install -e ".[hub]"') from None
    return huggingface_hub


def parse(path: str) -> tuple[str, str | None]:
    """"hf:OWNER/NAME[@REVISION]" -> (OWNER/NAME, revision or None)."""
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^\s@:]+))?", path)
    if not found:
        raise ConfigError(f"{path!r} is no hub path; nearest: hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return found[1], found[2]


def folder_name(path: str) -> str:
    """A name of its own for each hub path; names on the hub have no "--"."""
    parse(path)
    return re.sub(r"[^A-Za-z0-9_.@-]+", "--", path.removeprefix("hf:"))


def snapshot(path: str) -> tuple[pathlib.Path, str]:
    """(local folder, commit) of a model on the hub, with the files that describe it and not yet its weights. Raises ConfigError."""
    folder = _fetch(path, DESCRIPTIONS)
    return folder, folder.name


def weights(path: str, commit: str, names: Sequence[str]) -> pathlib.Path:
    """The file of weights, or index of shards, fetched: of ``names`` the first safetensors that ``commit`` has, else whatever
    safetensors it has. Raises ConfigError."""
    names = [n for n in names if n.endswith((WHOLE, INDEX))]
    folder = _fetch(path, (*DESCRIPTIONS, *names), commit)
    found = [n for n in names if (folder / n).is_file()][:1]
    if found and found[0].endswith(INDEX):
        shards = read_json(folder, found[0]).get("weight_map")
        shards = shards.values() if isinstance(shards, dict) else ()
        _fetch(path, (*DESCRIPTIONS, *{s for s in shards if isinstance(s, str) and s.endswith(WHOLE)}), commit)
    elif not found:
        _fetch(path, (*DESCRIPTIONS, "*" + WHOLE, "*" + INDEX), commit)
    if not any(folder.glob("*" + WHOLE)):
        raise ConfigError(f"{path} holds no safetensors file; other formats are not fetched: download and name the file with --src")
    return read.files_of(folder, prefer=found)[0]


def _fetch(path: str, patterns: Sequence[str], commit: str | None = None) -> pathlib.Path:
    """The snapshot's folder with all top-level files of these patterns, cached where the hub cannot be reached. Raises ConfigError."""
    hub, (name, revision) = _library(), parse(path)
    get = functools.partial(hub.snapshot_download, name, revision=commit or revision, allow_patterns=list(patterns),
                            ignore_patterns=["*/*"])
    try:
        return pathlib.Path(get())
    except Exception as error:
        advice = _advice(hub, error)
        if not advice:      # no answer: the library's own way to the cache does not cover every fault of a network
            with contextlib.suppress(Exception):
                return pathlib.Path(get(local_files_only=True))
            advice = (f"neither the hub nor its cache ({hub.constants.HF_HUB_CACHE}) gives it; connect and try again, or bring the "
                      f"files here and name their directory instead ({_line(error)})")
        raise ConfigError(f"{path}: {advice}") from error


def push(folder: pathlib.Path, path: str) -> str:
    """Uploads an exported directory, creating the repository (private) if need be; returns the commit's address. Raises ConfigError."""
    hub, (name, revision) = _library(), parse(path)
    api = hub.HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return api.upload_folder(folder_path=str(folder), repo_id=name, revision=revision, commit_message="Upload from vlm_jax").commit_url
    except Exception as error:
        raise ConfigError(f"--push={path}: {_advice(hub, error) or _line(error)}; the export itself is whole, upload it with: "
                          f"hf upload {name} {folder}") from error


def _advice(hub, error: Exception) -> str:
    """What to do about the hub's refusal; "" where it gave none."""
    known = {hub.errors.HFValidationError: "the hub allows no such name; nearest: hf:OWNER/NAME or hf:OWNER/NAME@REVISION",
             hub.errors.GatedRepoError: f"accept its terms on its page of the hub, and {LOG_IN}",
             hub.errors.RepositoryNotFoundError: f"the hub has no such model, or it is private: check the name, or {LOG_IN}",
             hub.errors.RevisionNotFoundError: "it has no such revision; name one of its branches, tags or commits"}
    refused = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
    return next((text for kind, text in known.items() if isinstance(error, kind)), f"the hub refuses: {LOG_IN}" if refused else "")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
