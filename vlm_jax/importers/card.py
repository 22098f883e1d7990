"""Model cards: README.md with YAML front matter (Hugging Face, "Model Cards"), read for the licence and written by an export."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from vlm_jax import provenance
from vlm_jax.importers.release import Release

CARD = "README.md"
UNNAMED = ("other", provenance.UNKNOWN)
LONGEST = 2**20
# Where the metadata of a repository on the hub says nothing, or not the whole: licences by its name.
BY_REPOSITORY = (
    (r"openai/clip-vit-.*", "mit"),
    (r"facebook/opt-.*", "opt"), (r"Salesforce/(instruct)?blip2?-opt-.*", "opt"),
    (r"(huggyllama|decapoda-research)/llama-.*", "llama-1"),
    (r"lmsys/vicuna-.*-v(0|1\.1|1\.3)", "llama-1"), (r"Salesforce/instructblip-vicuna-.*", "llama-1"))
# What the hub accepts as ``license``; any other is "other" with ``license_name``. Where it grows, the detour still holds.
HUB_LICENCES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 "
    "artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c "
    "ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl "
    "lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown".split())


# ---- read --------------------------------------------------------------------------------------

def metadata(folder: pathlib.Path) -> dict[str, Any]:
    """The front matter of a directory's card; {} without one, or where it is no YAML mapping."""
    path = folder / CARD
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|\Z)", file.read(LONGEST), re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def stated_licence(folder: pathlib.Path, repository: str = "", commit: str = "") -> tuple[str | None, str]:
    """(licence, address of its text or "") that a directory's card and its repository's name state; None where neither does,
    "other" where the card names it no further."""
    front = metadata(folder)
    given = front.get("license")
    names = [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]
    named = front.get("license_name")
    names = [named if name == "other" and isinstance(named, str) else name for name in names]
    known = [name for pattern, name in BY_REPOSITORY if re.fullmatch(pattern, repository)]
    if known or names == [provenance.UNKNOWN]:
        names = [name for name in names if name not in UNNAMED]
    link = front.get("license_link")
    link = link if isinstance(link, str) and names else ""
    if link and "://" not in link:      # a file of the repository
        link = f"https://huggingface.co/{repository}/blob/{commit}/{link}" if repository else ""
    return provenance.join_licences([*names, *known]), link


# ---- written -----------------------------------------------------------------------------------

def write_card(folder: pathlib.Path, layout: Release, config: Any, record: Mapping[str, Any], licence: str | None,
               done: Mapping[str, Any]) -> None:
    """The card of an export. ``licence``: of the exported weights; ``done``: a stage's DONE, {} for an import."""
    sources = provenance.sources(record)
    papers = record.get("papers", ())
    front = {**licence_fields(licence, [s.get("licence_link", "") for s in sources]), "library_name": layout.library,
             **({"pipeline_tag": layout.task} if layout.task else {}), "tags": ["vlm_jax", config.system],
             **({"base_model": bases} if (bases := [s["source"]["path"].removeprefix("hf:").partition("@")[0]
                                                    for s in sources if s["source"]["path"].startswith("hf:")]) else {})}
    last = record["starts"][-1] if record else {}
    trained = bool(done) or "origins" in record
    code = provenance.code_line(last["code"]) if last else "vlm_jax"
    out = [f"# {config.system}", f"{'Trained' if trained else 'Converted'} with {code}; the files have the layout of {layout.library}.",
           "## Licence", licence_text(licence)]
    if sources:
        out += ["## Weights taken over", bullets(map(source_line, sources))]
    if trained:
        steps = f"{done['step']:,}" if done else f"some of {config.steps:,}"
        out += ["## Training", bullets([f"{steps} steps of {config.data.batch} images, {config.data.size} pixels",
                                        *(f"{use}: {provenance.data_line({**found, 'spec': without_folders(found['spec'])})}"
                                          for use, found in last.get("data", {}).items())])]
    if done.get("scores"):
        out += ["## Scores", f"At step {done['step']:,}.", score_table(done["scores"])]
    if papers:
        out += ["## Papers", bullets(f"https://arxiv.org/abs/{paper}" for paper in papers)]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    (folder / CARD).write_text(f"---\n{text}---\n\n" + "\n\n".join(out) + "\n", encoding="utf-8")


def licence_fields(licence: str | None, links: list[str]) -> dict[str, Any]:
    """The front matter's fields of a licence; none for weights whose owner has not stated one."""
    names = provenance.split_licences(licence)
    if not names:
        return {}
    if set(names) <= HUB_LICENCES:
        return {"license": names[0] if len(names) == 1 else names}
    links = [link for link in links if link]
    name = re.sub(r"[^a-z0-9.]+", "-", "-and-".join(names)).strip("-")
    return {"license": "other", **({"license_name": name} if name != "other" else {}), **({"license_link": links[0]} if links else {})}


def licence_text(licence: str | None) -> str:
    if licence is None:
        return "Not stated. No weights were taken over from elsewhere."
    if provenance.UNKNOWN in provenance.split_licences(licence):
        return f"{licence}. A source of these weights states no licence: ask its authors before you use them."
    return f"{licence}." + (" Not for commercial use." if provenance.non_commercial(licence) else "")


def source_line(record: Mapping[str, Any]) -> str:
    source = record["source"]
    where = source["path"] if source["path"].startswith("hf:") else pathlib.PurePath(source["path"]).name
    files = ", ".join(f"{name} (sha256 {value})" for name, value in source["sha256"].items())
    return f"{where}{f' at {commit}' if (commit := source.get('commit')) else ''}, licence {record['licence']}: {files}"


def without_folders(spec: str) -> str:
    """A data spec for strangers: files without the folders they lie in."""
    parts = [part.strip().rstrip("/") for part in spec.split(";")]
    return "; ".join(part if part.startswith(("tfds:", "scenes:")) else re.sub(r"(?<=:).*/", "", part) for part in parts)


def score_table(scores: Mapping[str, float]) -> str:
    """A row for each score, with its interval, chance and baselines beside it."""
    rows = []
    for key in (key for key in scores if key.rpartition("/")[0] not in scores):
        own = {k.removeprefix(key + "/"): v for k, v in scores.items() if k.rpartition("/")[0] == key}
        low, high = own.pop("ci_low", None), own.pop("ci_high", None)
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        rows.append(f"| {key} | {scores[key]:.4g} | {interval} | {', '.join(f'{k} {v:.3g}' for k, v in own.items())} |")
    return "\n".join(["| score | value | 95% interval | chance and baselines |", "|---|---|---|---|", *rows])


def bullets(items: Any) -> str:
    return "\n".join(f"- {item}" for item in items)
