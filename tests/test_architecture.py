"""The house rules that a machine can check: import arrows, sizes, forbidden calls, documented keys."""

import ast
import re

import pytest
from factories import ROOT

PACKAGE = ROOT / "fewshot_d2"
FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = {"data", "modeling", "systems", "retrieval", "evaluation", "engine", "visualization"}
# What a part may not import; the shared modules at the top are free of parts altogether.
FORBIDDEN = {
    "structures": PARTS,
    "transforms": PARTS,
    "support_augmentation": PARTS,
    "files": {"structures", "data", "modeling", "systems", "retrieval", "evaluation", "engine"},
    "data": {"modeling", "systems", "retrieval", "evaluation", "engine", "visualization"},
    "modeling": {"data", "systems", "retrieval", "evaluation", "engine", "visualization"},
    "systems": {"data", "retrieval", "evaluation", "engine", "visualization"},
    "retrieval": {"systems", "evaluation", "engine", "visualization"},
    "evaluation": {"modeling", "systems", "retrieval", "engine"},
    "visualization": {"data", "modeling", "systems", "retrieval", "evaluation", "engine"},
    "inference": {"data", "modeling", "systems", "retrieval", "evaluation", "engine", "cli"},
    "decoding": {"structures", "data", "modeling", "systems", "evaluation", "engine", "inference"},
    "support_files": {"structures", "data", "modeling", "systems", "engine", "inference"},
    "cli": {"data", "modeling", "systems", "retrieval", "evaluation", "engine"},
}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """Dotted names below the package, relative imports resolved."""
    folder = ("fewshot_d2", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = (*start, *(node.module or "").split("."))
            names = [".".join(filter(None, module))]
            if not node.module:
                names = [f"{names[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".") for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file(path):
    text = path.read_text()
    tree = ast.parse(text)
    part = part_of(path)
    assert text.count("\n") <= 350
    assert ast.get_docstring(tree), "every module has a docstring"
    for module in imported_modules(path):
        if module[0] == "fewshot_d2" and len(module) > 1:
            assert module[1] not in FORBIDDEN.get(part, ()), f"{part} must not import {module[1]}"
            sibling = part == "systems" and module[1:2] == ["systems"] and len(module) > 2
            assert not sibling or module[2] == path.relative_to(PACKAGE).parts[1].removesuffix(
                ".py"
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "bare except"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("print", "sys.exit", "exit", "eval", "exec") or part == "cli", name
            assert not name.endswith(".cuda"), name
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            documented = ast.get_docstring(node)
            assert lines - (len(documented.split("\n")) if documented else 0) <= 60, node.name


def test_config_is_read_in_from_config_alone():
    """Constructors take values: no ``cfg.`` inside an __init__ or forward of modeling and systems."""
    for path in FILES:
        if part_of(path) not in ("modeling", "systems"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "forward"):
                assert not re.search(r"\bcfg\.", ast.unparse(node)), (path, node.name)


@pytest.mark.parametrize(
    "path", [*sorted(PACKAGE.glob("*config.py")), *sorted((PACKAGE / "systems").rglob("*.py"))]
)
def test_every_config_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r" {4}(node|cfg)\.[A-Z_.]+ = (?!CN\(\)|CfgNode\(\))", line):
            above = "\n".join(lines[max(0, number - 4) : number])
            assert "#" in above, f"{path.name}:{number + 1} {line.strip()}"


def test_weights_are_loaded_without_running_code():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", path
