"""Who may import whom, and what only partitioning may say (so that a sixteenth system stays one file)."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1] / "vlm_jax"
LEAVES = {"errors"}
ALLOWED = {  # package or module -> our packages and modules that it may import
    "errors": set(),
    "system": set(), "partitioning": set(), "config": set(), "weight_rules": set(), "provenance": set(),
    "nn": {"partitioning"},
    "models": {"nn", "partitioning"},
    "losses": {"partitioning"}, "decode": {"partitioning"},
    "systems": {"system", "models", "nn", "losses", "decode", "config", "partitioning"},
    "train": {"system", "partitioning", "weight_rules", "data.batch"},
    "data": set(),
    "evals": {"system", "data", "partitioning"},
    "importers": {"weight_rules", "models", "data.tokenizers", "provenance"},
    "report": set(), "checks": {"data"},
}
COMMANDS = {"main", "run", "feature_cache", "stage", "loading", "memory", "forecast", "roofline", "processes", "predict", "console", "evaluate", "doctor", "capfilt", "__init__"}
COMMAND_FILES = {"importers/cli.py"}
DEVICE_FREE = {"data", "report", "checks", "roofline", "errors", "config", "provenance"}
FORBIDDEN = re.compile(r"\b(PartitionSpec|process_index|NamedSharding|make_mesh)\b|\bMesh\(")


def modules():
    return sorted(ROOT.rglob("*.py"))


def owner(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for a in node.names:
                is_module = (ROOT.parent / pathlib.Path(*node.module.split("."), a.name)).with_suffix(".py").exists() or \
                    (ROOT.parent / pathlib.Path(*node.module.split("."), a.name)).is_dir()
                yield f"{node.module}.{a.name}" if is_module else node.module


def wrong(path):
    me = owner(path)
    if me in COMMANDS or str(path.relative_to(ROOT)) in COMMAND_FILES:
        return []
    bad = []
    for name in imports(path):
        if name == "jax" or name.startswith("jax."):
            bad += [f"{path.name} imports {name}: {me} is device-free"] if me in DEVICE_FREE else []
        if not name.startswith("vlm_jax."):
            continue
        target = name.removeprefix("vlm_jax.")
        top = target.split(".")[0]
        allowed = ALLOWED[me] | LEAVES
        if top == me and me == "systems":
            bad.append(f"{path.name} imports its sibling {name}: what two systems share lives in models/")
        elif top != me and not any(target == a or target.startswith(a + ".") for a in allowed):
            bad.append(f"{path.relative_to(ROOT)} imports {name}; {me} may import {sorted(allowed)}")
    return bad


def test_every_module_belongs_to_a_room():
    assert {owner(p) for p in modules()} <= set(ALLOWED) | COMMANDS


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path):
    assert wrong(path) == []


def test_the_import_test_sees_a_breach(tmp_path, monkeypatch):
    breach = ROOT / "data" / "batch.py"
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, *a: "import jax\nfrom vlm_jax.systems import clip\n"
                        if self == breach else "")
    assert len(wrong(breach)) == 2


@pytest.mark.parametrize("path", [p for p in modules() if owner(p) != "partitioning"], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_partitioning_speaks_of_the_mesh(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):     # prose is free
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    for line in ast.unparse(tree).splitlines():
        allowed = "partitioning.make_mesh" in line
        assert allowed or not FORBIDDEN.search(line), line


def test_no_room_below_systems_names_a_family():
    families = [p.stem for p in (ROOT / "systems").glob("*.py") if p.stem != "__init__"]
    assert "clip" in families and "coca" in families
    for room in ("train", "data", "evals"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Name) and node.id.lower() in families:
                    raise AssertionError(f"{path} uses the name {node.id}")
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    assert not any(f"systems.{f}" in ast.unparse(node) for f in families)
