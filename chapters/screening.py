"""What an answer may not use, found by reading its source before it runs: whatever could change how it is judged.

The rule that students can be told: import none of FORBIDDEN, nor reach it as an attribute of what you import, unless
the book's own file does. Names of variables, arguments and functions never count.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

FORBIDDEN = ("tests", "conftest", "pytest", "_pytest", "hypothesis", "unittest")  # the tests, and what runs them
FORBIDDEN += ("numpy.testing", "torch.testing")  # what compares an answer with what was expected
FORBIDDEN += ("importlib", "inspect", "gc", "ctypes", "sys.modules")  # ways to find and to change those


def objection(answer: bytes, solution: bytes, forbidden: Sequence[str] = FORBIDDEN) -> str | None:
    """Why an answer is refused, such as "line 3 uses numpy.testing"; None if the source gives no reason."""
    allowed = uses(solution, forbidden)
    for name, line in uses(answer, forbidden).items():
        if name not in allowed:
            return f"line {line} uses {name}"
    return None


def uses(source: bytes, forbidden: Sequence[str]) -> dict[str, int]:
    """Which of the dotted names `forbidden` a source reaches, and in which line first.

    None of them if it is not Python: then its tests will say so.
    """
    try:
        places = reached(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, int] = {}
    for line, name in places:
        for prefix in forbidden:
            if f"{name}.".startswith(f"{prefix}."):
                found.setdefault(prefix, line)
    return found


def reached(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of each import, and of each attribute of what was imported, under whatever name, by line."""
    found: list[tuple[int, str]] = []
    meaning: dict[str, str] = {}  # name in this file -> the dotted name that was imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                found.append((node.lineno, alias.name))
                meaning |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{'.' * node.level}{node.module or ''}.{alias.name}"
                found.append((node.lineno, name))
                meaning[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            top, _, rest = ast.unparse(node).partition(".")
            if top in meaning:
                found.append((node.lineno, f"{meaning[top]}.{rest}"))
    return sorted(found)
