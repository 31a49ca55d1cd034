"""List the statements of the package that depend on CUDA, and which of them were executed.

    coverage run -m pytest -n 0 -m "more or not more" FILE...     files that simulate a card, plan, or need no card
    python -m tests.simulation.cuda_lines .coverage.*

Data that is older than a source file is not used for it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lora_llava"
_PARTS = ("body", "orelse", "handlers", "finalbody")


def cuda_statements(tree: ast.AST) -> Iterator[int]:
    """Yield the first lines of statements that name CUDA, and of those inside a condition that does."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.excepthandler)) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not _names_cuda(node):
                continue
            yield node.lineno
            inside = [*node.body, *node.orelse] if isinstance(node, ast.If) else getattr(node, "body", [])
            yield from (each.lineno for each in inside)


def _names_cuda(statement: ast.AST) -> bool:
    """Check whether a statement's own part, without the statements in it, names CUDA in code."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return False  # a docstring
    own = [child for name, child in ast.iter_fields(statement) if name not in _PARTS]
    nodes = [node for field in own for each in (field if isinstance(field, list) else [field]) for node in _walk(each)]
    return any("cuda" in _name(node).lower() for node in nodes)


def _walk(value: object) -> Iterator[ast.AST]:
    return ast.walk(value) if isinstance(value, ast.AST) else iter(())


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if node.value == "cuda" else ""
    return str(getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None) or "")


def main() -> None:
    import coverage

    executed: dict[str, set[int]] = {}
    for file in sys.argv[1:]:
        data = coverage.CoverageData(file)
        data.read()
        for name in data.measured_files():
            if Path(name).exists() and Path(name).stat().st_mtime > Path(file).stat().st_mtime:
                continue  # the source is newer, so its lines may be others
            executed.setdefault(name, set()).update(data.lines(name) or ())
    total = run = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        for line in sorted(set(cuda_statements(ast.parse(text)))):
            total += 1
            if line in executed.get(str(path), ()):
                run += 1
            else:
                print(f"{path.relative_to(PACKAGE)}:{line}: {text.splitlines()[line - 1].strip()}")
    print(f"{run} of {total} executed, {run / total:.0%}")


if __name__ == "__main__":
    main()
