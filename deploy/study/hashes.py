"""Hashes that identify the code of a result: the method's, and that of the code that turns runs into results.

    python -m deploy.study.hashes            # the method's hash in the working tree
    python -m deploy.study.hashes 6003633    # the method's hash in a commit

A hash is taken over syntax trees, definition by definition, regardless of the file that contains a
definition. Comments, docstrings, formatting, the text of errors and the order of definitions leave it
unchanged, as does moving, renaming or splitting a file; a changed sign, default or condition changes it. Imports from the project's own
modules count only where they rename what they import, because the imported definition is itself part of the
hash and class names are unique in the project. Results written before this scheme carry hashes over bytes
and paths; they have no ``hash_format`` and are never pooled with others.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import xxhash

import distill

HASH_FORMAT = 2
"""Written with every hash. Results without it have format 1, over the bytes and the paths of files."""
METHOD_CODE = ("distill/**/*.py", "actors/**/*.py", "learner/**/*.py", "deploy/run/prepare.py")
"""A change of this code makes older runs those of another method."""
MEASURING_CODE = ("deploy/study/measure/*.py",)
"""A change of this code makes the measures of older runs stale."""
RESULTS_CODE = (
    *MEASURING_CODE,
    *(f"deploy/study/tables/{name}.py" for name in ("run_results", "statistics", "frontier", "differences")),
)
"""A change of this code makes older results incomparable; the runs stay valid."""
_OUR_PACKAGES = frozenset({"distill", "actors", "learner", "deploy"})
_ROOT = Path(distill.__file__).parent.parent


def method_hash() -> str:
    """The hash of the method's code, 16 hexadecimal digits."""
    return code_hash(_working_tree(METHOD_CODE))


@functools.cache
def measuring_hash() -> str:
    """The hash of the code that measures a run's texts, 16 hexadecimal digits."""
    return code_hash(_working_tree(MEASURING_CODE))


def results_hash() -> str:
    """The hash of the code that turns runs into results, 16 hexadecimal digits."""
    return code_hash(_working_tree(RESULTS_CODE))


def code_hash(sources: Iterable[str]) -> str:
    """The hash of Python sources; neither their order nor their file names matter.

    Raises: SyntaxError.
    """
    definitions = {
        xxhash.xxh3_64_hexdigest(repr(_canonical(part)).encode())
        for source in sources
        for statement in ast.parse(source).body
        for part in _counted(statement)
    }
    return xxhash.xxh3_64_hexdigest("\n".join(sorted(definitions)).encode())


def _counted(statement: ast.stmt) -> list[ast.AST]:
    """The parts of a top-level statement that can change a number: not docstrings, not `__all__`."""
    if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
        return []
    if isinstance(statement, ast.Import | ast.ImportFrom):
        # One import per name, so that splitting a file does not change the hash.
        module = statement.module or "" if isinstance(statement, ast.ImportFrom) else None
        return [
            ast.ImportFrom(module, [name], 0) if module is not None else ast.Import([name])
            for name in statement.names
            if not _is_ours(module or name.name) or name.asname not in (None, name.name)
        ]
    return [] if _is_text(statement) else [statement]


def _canonical(node: object) -> object:
    """A syntax tree as nested tuples, without positions, docstrings and empty fields.

    Empty fields are dropped because newer Python versions add some.
    """
    if isinstance(node, list):
        return [_canonical(item) for item in node if not (_is_text(item) or _is_plain_import(item))]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.Raise):
        # A run that ends well has raised nothing that ends runs: only the class can matter, to a handler.
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ("Raise", ast.unparse(raised) if raised is not None else "")
    fields = [
        (name, _canonical(value))
        for name, value in ast.iter_fields(node)
        if value is not None and value != []
    ]
    if isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
        fields = [(name, value) for name, value in fields if name != "module"]
    return (type(node).__name__, *fields)


def _is_text(node: object) -> bool:
    """Whether a statement is a docstring, or the documentation of a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_plain_import(node: object) -> bool:
    """Whether a statement imports the project's own definitions under their own names."""
    return (
        isinstance(node, ast.ImportFrom)
        and _is_ours(node.module or "")
        and all(name.asname in (None, name.name) for name in node.names)
    )


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in _OUR_PACKAGES


def _working_tree(patterns: Sequence[str], root: Path = _ROOT) -> Iterator[str]:
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        yield path.read_text(encoding="utf-8")


def method_hash_of_commit(commit: str) -> str:
    """The method's hash in a commit.

    Raises: subprocess.CalledProcessError when git knows no such commit.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout

    names = [PurePosixPath(name) for name in git("ls-tree", "-r", "--name-only", commit).splitlines()]
    ours = [name for name in names if name.suffix == ".py" and _is_method(name)]
    return code_hash(git("show", f"{commit}:{name}") for name in ours)


def _is_method(name: PurePosixPath) -> bool:
    """Whether a path belongs to the method, in the present layout or in that of earlier commits."""
    if name.parts[0] in ("distill", "actors", "learner"):
        return True
    return name.parts[0] == "deploy" and name.name == "prepare.py"


def stamps() -> dict[str, int | str]:
    """The hashes that are written into results."""
    return {"hash_format": HASH_FORMAT, "method_hash": method_hash(), "results_hash": results_hash()}


if __name__ == "__main__":
    print(method_hash_of_commit(sys.argv[1]) if len(sys.argv) > 1 else method_hash())
