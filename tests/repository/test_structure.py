"""The shape of the package: imports flow one way, files stay short, and it stays thin."""

import ast
from pathlib import Path

import pytest

from mmheads import paths

PACKAGE = paths.ROOT / "mmheads"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_CLASS = 250
MOST_LINES_OF_CODE = 11_698
"""The package only shrinks from here: lower this number with every change that makes it thinner."""


def name_of(path: Path) -> str:
    parts = path.relative_to(paths.ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test))
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in later and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names | {node.module}) & set(MODULES)
        elif isinstance(node, ast.Import) and node not in later:
            found |= {alias.name for alias in node.names} & set(MODULES)
    return found - {"mmheads", name_of(path)}


def test_imports_have_no_cycle():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    for name, targets in graph.items():  # A module may import its own package's other modules.
        targets -= {package for package in packages if name.startswith(f"{package}.")}
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a cycle: {' -> '.join((*above, name))}"
        if name not in finished:
            for target in sorted(graph[name]):
                visit(target, (*above, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


LAYERS = (
    {"blocks", "checks", "paths", "images", "statistics", "compat", "metrics"},
    {"heads", "provenance", "pdfs", "tables", "figures", "gguf"},
    {"examples", "scores", "score_files", "models", "published", "controls", "store", "plots"},
    {"families", "attention", "rendering", "processing", "locating", "prompts", "paper_b"},
    {"decoder", "prefix", "streaming", "together"},
    {"scoring", "kept_scores", "answers", "effects", "causal", "retrieval", "tasks", "evaluation"},
    {"detection"},
    {"example_files", "explorer"},
    {"commands"},
    {"cli", "__main__"},
)
"""From the bottom to the top: a module imports from its own layer or from those below."""


def part_of(module: str) -> str:
    return module.split(".")[1]


def test_imports_never_go_up():
    level = {name: height for height, layer in enumerate(LAYERS) for name in layer}
    assert {part_of(name) for name in MODULES if name != "mmheads"} == set(level)
    upward = [
        (name, target)
        for name, path in MODULES.items()
        if name != "mmheads"
        for target in imports_of(path)
        if level[part_of(target)] > level[part_of(name)]
    ]
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_and_no_class_is_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_CLASS, node.name


def code_lines(text: str) -> int:
    """Lines that hold code: neither blank lines, nor comments, nor docstrings."""
    documented = set()
    for node in ast.walk(ast.parse(text)):
        first = getattr(node, "body", [None])
        first = first[0] if isinstance(first, list) and first else None
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            documented |= set(range(first.lineno, first.end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in enumerate(text.split("\n"), 1)
    )


def test_the_package_is_thin():
    total = sum(code_lines(path.read_text(encoding="utf-8")) for path in FILES)
    assert total <= MOST_LINES_OF_CODE
