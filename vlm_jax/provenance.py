"""Where a model comes from: ``provenance.json`` in every stage directory and every imported directory.

    system, papers    the family, and the arXiv ids of its papers
    licence           of the weights taken over: an SPDX id or a name, several joined by " AND "; "unknown" where a
                      source states none, null where every weight was trained here
    licence_link      the licence's text, where the source says so
    source            imports: release, path, hub commit, SHA-256 of every file
    origins           runs: each directory that ``init`` took weights from, the hash of its checkpoint, its own record
    starts            one entry for each start of a run: step, date, command, code, versions, devices, data

A licence travels: what is trained from weights carries theirs, and an export writes it into the model card.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlm_jax import __version__
from vlm_jax.errors import ConfigError

FILE = "provenance.json"
UNKNOWN = "unknown"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
# Licences that allow research alone though their names do not say so.
RESEARCH_ONLY = ("llama-1", "opt", "apple-amlr", "deepfloyd-if-license")
log = logging.getLogger("vlm_jax")


class NonCommercialWeights(UserWarning):
    """The loaded weights, or some that they were trained from, may not be used commercially."""


# ---- licences ----------------------------------------------------------------------------------

def join_licences(licences: Iterable[str | None]) -> str | None:
    """Several licences as one string, each once; None where there are none."""
    names = [" ".join(name.split()).lower() for text in licences if text for name in re.split(r"(?i)\s+and\s+", text.strip())]
    return " AND ".join(dict.fromkeys(names)) or None


def split_licences(licence: str | None) -> list[str]:
    return licence.split(" AND ") if licence else []


def non_commercial(licence: str | None) -> bool:
    """Whether one of the licences forbids commercial use (CC's "nc", "non-commercial", "research", or a name that is known to)."""
    return any(name in RESEARCH_ONLY or re.search(r"(?<![a-z])nc(?![a-z])|non-?commercial|research", name)
               for name in split_licences(join_licences([licence])))


def licence_of(record: Mapping[str, Any]) -> str | None:
    """The licence of a record; "unknown" for a directory without one."""
    return record.get("licence", UNKNOWN)


def licence_line(record: Mapping[str, Any]) -> str:
    licence = licence_of(record)
    if licence is None:
        return "none taken over: every weight was trained here"
    return licence + (" (non-commercial)" if non_commercial(licence) else "")


def tell_licence(folder: pathlib.Path, record: Mapping[str, Any], stacklevel: int = 2) -> None:
    """Logs the licence of weights that are opened, and warns of non-commercial ones (``NonCommercialWeights``)."""
    log.info("%s: licence of the weights: %s", folder, licence_line(record))
    if non_commercial(licence_of(record)):
        of = ", ".join(source["source"]["path"] for source in sources(record))
        warnings.warn(f"{folder}: these weights are not for commercial use: licence {licence_of(record)}{f', from {of}' if of else ''}",
                      NonCommercialWeights, stacklevel=stacklevel + 1)


# ---- the file ----------------------------------------------------------------------------------

def read(folder: pathlib.Path) -> dict[str, Any]:
    """The record of a directory, {} where it has none. Raises ConfigError for a file that is not one."""
    path = pathlib.Path(folder) / FILE
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        fault = "" if isinstance(record, dict) and {"licence", "starts"} <= record.keys() else "no object with licence and starts"
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ConfigError(f"{path} is no record of provenance ({fault}); bring back the original, or move it away: the licence is then unknown")
    return record


def write(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
    """In one rename, so that a kill leaves the old record or the new one."""
    fresh = pathlib.Path(folder) / (FILE + ".tmp")
    fresh.write_text(json.dumps(record, indent=1))
    os.replace(fresh, pathlib.Path(folder) / FILE)


def record_start(folder: pathlib.Path, entry: Mapping[str, Any], *, system: str, papers: Sequence[str],
                 origins: Mapping[str, pathlib.Path] | None) -> dict[str, Any]:
    """Adds a start of a run to its directory's record and returns the record.

    ``origins``: directory by name in ``init``, of all weights taken over; None for a run that resumes: its record knows them.
    """
    record = read(folder)
    if origins is None:
        known = {"origins": record.get("origins", []), "licence": licence_of(record)}
    else:
        taken = [{"origin": name, "sha256": weights_hash(origin), "provenance": read(origin)} for name, origin in origins.items()]
        known = {"origins": taken, "licence": join_licences(licence_of(o["provenance"]) for o in taken)}
    record = {"system": system, "papers": list(papers), **known, "starts": [*record.get("starts", []), dict(entry)]}
    write(folder, record)
    return record


def start(devices: Sequence[Any], mesh: Mapping[str, int] | None = None, step: int = 0,
          data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is known at a start. ``devices``: jax's; ``mesh``: axis -> size; ``data``: use -> ``data.fingerprint.describe``."""
    return {"step": step, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "command": command(),
            "code": revision(), "versions": versions(),
            "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices), "mesh": dict(mesh or {})},
            "data": dict(data or {})}


def sources(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of the imports that a model goes back to, each once."""
    found = [record] if "source" in record else [s for o in record.get("origins", ()) for s in sources(o["provenance"])]
    return [s for i, s in enumerate(found) if s["source"] not in [f["source"] for f in found[:i]]]


# ---- what it holds -----------------------------------------------------------------------------

def command(argv: Sequence[str] | None = None) -> str:
    """The command line as it was typed, quoted for a shell; of the interpreter's path the name alone."""
    first, *rest = argv or sys.orig_argv
    return shlex.join([os.path.basename(first), *rest])


def revision(package: pathlib.Path = pathlib.Path(__file__).parent) -> dict[str, Any]:
    """The code: version; and, in a git checkout that tracks it, commit and whether the package is modified."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(package), *args], check=True, capture_output=True, text=True, timeout=30,
                              env={**environment, "GIT_OPTIONAL_LOCKS": "0"}).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", "__init__.py")      # a checkout may merely surround an installed package
        return {"version": __version__, "commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {"version": __version__}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = UNKNOWN
    return found


def weights_hash(folder: pathlib.Path) -> str:
    """SHA-256 over the manifests of a stage's newest checkpoint and frozen part: they hold the hash of every file."""
    manifests = sorted(folder.glob("checkpoints/*/manifest.json"), key=lambda p: int(p.parent.name))[-1:] + sorted(folder.glob("frozen/*/manifest.json"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in manifests)).hexdigest()


# ---- for people --------------------------------------------------------------------------------

def lines(record: Mapping[str, Any]) -> dict[str, str]:
    """A record as label -> text, for a report."""
    if not record:
        return {}
    *_, last = starts = record["starts"]
    code, devices = last["code"], last["devices"]
    mesh = " x ".join(f"{axis}={n}" for axis, n in devices["mesh"].items())
    out = {"Licence of the weights": licence_line(record),
           "Weights taken over": "; ".join(f"{o['origin']} (sha256 {o['sha256'][:12]})" for o in record.get("origins", ())),
           "Papers": ", ".join(f"arXiv {paper}" for paper in record["papers"]),
           "Command": last["command"],
           "Started": starts[0]["date"] + "".join(f", at step {s['step']} {s['date']}" for s in starts[1:]),
           "Code": code_line(code)}
    out |= {f"Data, {use}": data_line(found) for use, found in last["data"].items()}
    out |= {"Devices": f"{devices['count']} x {devices['kind']} ({devices['platform']}){f', mesh {mesh}' if mesh else ''}",
            "Versions": ", ".join(f"{name} {version}" for name, version in last["versions"].items())}
    return {label: text for label, text in out.items() if text}


def code_line(code: Mapping[str, Any]) -> str:
    return f"vlm_jax {code['version']}" + (f", commit {code['commit']}{' (modified)' if code['modified'] else ''}" if "commit" in code else "")


def data_line(found: Mapping[str, Any]) -> str:
    return f"{found['spec']}, {found['samples']:,} samples, fingerprint {found['fingerprint'][:12]}"
