"""The machine: versions, devices and who holds them, free memory and disk, cache folders. Looks, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlm_jax.checks import ERROR, OK, WARNING, Finding

AREA = "environment"
SECONDS = 180            # for JAX to find its devices; a chip that a dead process holds lets it wait for ever
LITTLE_MEMORY, LITTLE_DISK = 4e9, 10e9
ACCELERATORS = re.compile(r"/dev/(accel\d+|vfio/\d+|nvidia\d+)")
PLUGINS = re.compile(r"libtpu|jax-(cuda|rocm)\d+-plugin")
TPU_FILES = ("accel*", "vfio/[0-9]*")
TPU_LOCK = pathlib.Path("/tmp/libtpu_lockfile")
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy")
LIST_DEVICES = """
import json, jax
devices = jax.devices()
stats = [d.memory_stats() or {} for d in jax.local_devices()]
print("DEVICES" + json.dumps({"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices),
      "limit": stats[0].get("bytes_limit"), "used": stats[0].get("bytes_in_use")}))
"""


def examine(workdir: str = "runs", accelerator: Callable[[], str] = lambda: "") -> list[Finding]:
    """All checks of the machine. workdir: where runs will be written; accelerator: "gpu" or "tpu" where the machine shows one, whatever JAX sees."""
    holders = who_holds()
    return [*versions(), devices(accelerator(), holders), *held(holders), memory(), disk("work directory", workdir), *caches(), *surroundings()]


def finding(name: str, text: str, status: str = OK) -> Finding:
    return Finding(AREA, name, status, text)


# ---- versions ----------------------------------------------------------------------------------

def versions(package: str = "vlm_jax") -> Iterator[Finding]:
    """The package's own bounds, and JAX's for the libraries of accelerators that are installed."""
    try:
        own = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        yield finding("versions", f"{package} is not installed as a package, so that its bounds are not known: pip install -e .", WARNING)
        return
    python = ".".join(map(str, sys.version_info[:3]))
    wrong = [] if within(python, own.get("Requires-Python") or "") else [f"Python {python}, not {own['Requires-Python']}"]
    extras: list[tuple[str, str]] = []
    for name in (package, "jax"):
        try:
            extras += [(name, requirement) for requirement in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            pass        # told of below: it is one of the package's own
    checked = 0
    for of, text in extras:
        name, bounds, extra = parse_requirement(text)
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong += [f"{name} is missing ({of} needs {bounds or 'it'})"] if not extra else []
            continue
        if extra and (of == package or not PLUGINS.fullmatch(name)):      # extras are somebody's choice; an accelerator's library must fit JAX all the same
            continue
        checked += 1
        if not within(found, bounds):
            wrong.append(f"{name} {found} is installed, {of} needs {bounds}")
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = "none"
    yield finding("versions", "; ".join(wrong) + ": pip install -e ." if wrong else
                  f"Python {python}, jax {jax}, {checked} requirements within their bounds", ERROR if wrong else OK)


def parse_requirement(text: str) -> tuple[str, str, bool]:
    """"jax<0.12,>=0.10; extra == 'x'" -> (name, bounds, whether it is of an extra)."""
    text, _, marker = text.partition(";")
    match = re.match(r"\s*([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", text)
    return match.group(1), match.group(2).strip(), "extra" in marker


def within(version: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet
    return SpecifierSet(bounds).contains(version, prereleases=True)


# ---- devices -----------------------------------------------------------------------------------

def devices(accelerator: str, holders: Mapping[int, str], seconds: float = SECONDS) -> Finding:
    """What JAX finds, asked in a process of its own: one that waits for a chip does not take this one with it."""
    busy = f"; {len(holders)} process(es) hold the chip, see below" if holders else ""
    try:
        done = subprocess.run([sys.executable, "-c", LIST_DEVICES], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return finding("devices", f"JAX found none within {seconds:g} s{busy}", ERROR)
    told = re.search(r"^DEVICES(.*)$", done.stdout, re.M)
    if not told:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return finding("devices", f"JAX does not start: {lines[-1] if lines else f'exit code {done.returncode}'}{busy}", ERROR)
    found = json.loads(told.group(1))
    text = f"{found['count']} x {found['kind']} ({found['platform']})"
    if found["limit"]:
        text += f", {gigabytes(found['limit'])} each, {gigabytes(found['used'] or 0)} in use"
    if found["platform"] == "cpu" and accelerator:
        asked = os.environ.get("JAX_PLATFORMS") == "cpu"
        return finding("devices", f"{text}, though the machine has a {accelerator.upper()}" + (
            " (JAX_PLATFORMS=cpu)" if asked else f'; pip install -e ".[{"cuda" if accelerator == "gpu" else "tpu"}]", or --platform=cpu{busy}'),
            WARNING if asked else ERROR)
    return finding("devices", text)


def who_holds(proc: str = "/proc") -> dict[int, str]:
    """The processes that have an accelerator's device file open: id -> command and file. Other users' show only to root; {} where there is no /proc."""
    out: dict[int, str] = {}
    if not os.path.isdir(proc):
        return out
    for entry in os.scandir(proc):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            links = {os.readlink(link.path) for link in os.scandir(os.path.join(entry.path, "fd"))}
            held = sorted(link for link in links if ACCELERATORS.fullmatch(link))
            if held:
                with open(os.path.join(entry.path, "cmdline"), "rb") as file:
                    command = file.read(200).replace(b"\0", b" ").decode("utf-8", "replace").strip()
                out[int(entry.name)] = f"{command or '?'} ({', '.join(held)})"
        except OSError:      # it has ended, or is another user's
            continue
    return out


def held(holders: Mapping[int, str]) -> Iterator[Finding]:
    for pid, command in sorted(holders.items()):
        yield finding("chip is held", f"by process {pid}: {command}", WARNING)
    if TPU_LOCK.exists() and not holders and any(list(pathlib.Path("/dev").glob(pattern)) for pattern in TPU_FILES):
        yield finding("TPU lock", f"{TPU_LOCK} was left by a process that no longer holds a chip; remove it where JAX says that the TPU is in use", WARNING)


# ---- room --------------------------------------------------------------------------------------

def available_memory() -> int | None:
    """Bytes that may be had without swapping: of the machine, or of the control group that this process is in; None where the system does not tell."""
    try:
        kilobytes = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    except OSError:
        return None
    found = [int(kilobytes.group(1)) * 1024] if kilobytes else []
    try:
        limit, used = (pathlib.Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        found += [int(limit) - int(used)] if limit != "max" else []
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def memory() -> Finding:
    free = available_memory()
    if free is None:
        return finding("host memory", "this system does not tell")
    return finding("host memory", f"{gigabytes(free)} available, {os.cpu_count()} processors", WARNING if free < LITTLE_MEMORY else OK)


def disk(name: str, path: str) -> Finding:
    """Room for what is written below ``path``, and whether it can be."""
    if "://" in path:
        return finding(name, f"{path}: not looked at")
    there = pathlib.Path(path).expanduser().absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        return finding(name, f"{there} cannot be written", ERROR)
    free = shutil.disk_usage(there).free
    return finding(name, f"{gigabytes(free)} free at {there}", ERROR if free < LITTLE_DISK / 100 else WARNING if free < LITTLE_DISK else OK)


def caches() -> Iterator[Finding]:
    """Folders that outlive a run. What others may write into is not to be trusted: JAX loads programs from its own."""
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    index = os.environ.get("VLM_JAX_CACHE") or str(pathlib.Path.home() / ".cache" / "vlm_jax")
    if not programs:
        yield finding("compiled programs", "not kept: JAX_COMPILATION_CACHE_DIR is not set, so that each start compiles anew")
    for name, path in (("compiled programs", programs), ("indices of data", index), ("temporary files", tempfile.gettempdir())):
        if not path or "://" in path:
            continue
        room = disk(name, path)
        folder = pathlib.Path(path).expanduser()
        if name == "compiled programs" and folder.exists() and os.name == "posix" and folder.stat().st_mode & 0o022:
            yield finding(name, f"{folder} can be written by others, who could plant programs there: chmod 700 {folder}", WARNING)
        else:
            yield room


def surroundings() -> Iterator[Finding]:
    several = [name for name in PROXIES if os.environ.get(name)]
    if several:
        yield finding("proxy", f"{', '.join(several)} set: processes of one run may not reach each other; add their hosts to no_proxy", WARNING)


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.3g} GB"


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [{"area": f.area, "name": f.name, "status": f.status, "text": f.text} for f in findings]
