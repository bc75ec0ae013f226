"""The hash of the method changes with everything that can change a number, and with nothing else."""

from __future__ import annotations

import ast
import shutil
from collections import Counter
from pathlib import Path

import pytest

from deploy.study import hashes

ROOT = Path(hashes.distill.__file__).parent.parent
SOURCE = '''"""A module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.objectives import moment_gap

__all__ = ["Model", "gap"]

BOUND = 1.0
"""The bound of every critic."""


def gap(p: Tensor, q: Tensor) -> Tensor:
    """The gap."""
    # The teacher comes second.
    from distill.credit import whiten

    if p.ndim > 2:
        raise ValueError("p must be a matrix")
    return moment_gap(p, q) - whiten(BOUND)


class Model(nn.Module):
    """A model."""

    size: int = 3
    """Its width."""

    def forward(self) -> Tensor:
        return torch.zeros(self.size)
'''
HASH = hashes.code_hash([SOURCE])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another."""'),
        ('    """The gap."""\n', ""),
        ("# The teacher comes second.", "# First the policy."),
        ('"""Its width."""', '"""Columns."""'),
        ("from distill.objectives import", "from distill.method.objectives import"),
        ("from distill.credit import", "from distill.method.credit import"),
        ("moment_gap(p, q) - whiten", "(\n        moment_gap(p, q)\n        - whiten"),
        ('__all__ = ["Model", "gap"]\n', ""),
        ("from torch import Tensor, nn", "from torch import nn\nfrom torch import Tensor"),
        ("p must be a matrix", "p must have two dimensions"),
    ],
)
def test_documentation_formatting_and_module_paths_do_not_count(old: str, new: str):
    changed = SOURCE.replace(old, new)
    assert changed != SOURCE
    if new.startswith("("):
        changed = changed.replace("whiten(BOUND)", "whiten(BOUND)\n    )")
    assert hashes.code_hash([changed]) == HASH


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("moment_gap(p, q) - whiten", "moment_gap(p, q) + whiten"),
        ("moment_gap(p, q)", "moment_gap(q, p)"),
        ("BOUND = 1.0", "BOUND = 2.0"),
        ("size: int = 3", "size: int = 0"),
        ("import moment_gap", "import forward_kl as moment_gap"),
        ("import whiten", "import leave_one_out as whiten"),
        ("import torch\n", "import jax as torch\n"),
        ("torch.zeros", "torch.ones"),
        ("p.ndim > 2", "p.ndim > 3"),
        ("raise ValueError", "raise KeyError"),
    ],
)
def test_changes_of_the_computation_count(old: str, new: str):
    changed = SOURCE.replace(old, new)
    assert changed != SOURCE
    assert hashes.code_hash([changed]) != HASH


def test_splitting_and_reordering_files_does_not_count():
    body, model = SOURCE.split("\n\nclass Model")
    head = "import torch\nfrom torch import Tensor, nn\n\n"
    assert hashes.code_hash([f"{head}class Model{model}", body]) == HASH


def method(root: Path) -> str:
    return hashes.code_hash(hashes._working_tree(hashes.METHOD_CODE, root))


def test_moving_a_file_does_not_count_and_a_sign_does(tmp_path: Path):
    """On a copy of the real code. A changed docstring does not count either."""
    for package in ("distill", "actors", "learner", "deploy"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = method(tmp_path)
    assert before == hashes.method_hash()
    objectives = tmp_path / "distill" / "objectives.py"
    deeper = tmp_path / "learner" / "somewhere" / "deeper"
    deeper.mkdir(parents=True)
    objectives = objectives.rename(deeper / "formulas.py")
    text = objectives.read_text()
    objectives.write_text(text.replace('"""H(p) =', '"""The entropy, H(p) ='))
    assert objectives.read_text() != text
    assert method(tmp_path) == before
    objectives.write_text(text.replace("return -_dot(", "return _dot("))
    assert objectives.read_text() != text
    assert method(tmp_path) != before


def test_every_pattern_matches_files():
    for pattern in (*hashes.METHOD_CODE, *hashes.RESULTS_CODE):
        assert list(ROOT.glob(pattern)), f"{pattern} matches no file"


def test_commits_and_the_working_tree_select_the_same_files():
    """Otherwise a commit would have another hash when it is checked out."""
    paths = {path.relative_to(ROOT) for pattern in hashes.METHOD_CODE for path in ROOT.glob(pattern)}
    sources = {path.relative_to(ROOT) for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts}
    assert {path for path in sources if hashes._is_method(path)} == paths


def test_names_of_classes_are_unique():
    """The hash relies on this where it ignores imports: the name alone identifies the class."""
    names = Counter(
        node.name
        for pattern in ("distill/**/*.py", "actors/**/*.py", "learner/**/*.py", "deploy/**/*.py")
        for path in ROOT.glob(pattern)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []
