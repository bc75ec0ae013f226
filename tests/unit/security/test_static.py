"""What no module of this project does: each rule is a row of the table, and finds its example."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODULES = [
    path
    for package in ("distill", "actors", "learner", "deploy")
    for path in sorted((ROOT / package).rglob("*.py"))
]
_PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
_SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "WrittenLoader"}
_ALL_ADDRESSES = {"0.0.0.0", "::", "[::]"}


def _name(node: ast.expr) -> str:
    """The dotted name of a function that is called."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def _argument(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _imports(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Import):
        return any(each.name.partition(".")[0] in names for each in node.names)
    if isinstance(node, ast.ImportFrom):
        imported = {each.name for each in node.names}
        return (node.module or "").partition(".")[0] in names or bool(imported & names)
    return (
        isinstance(node, ast.Call)
        and _name(node.func).endswith("import_module")
        and any(isinstance(each, ast.Constant) and each.value in names for each in node.args)
    )


def _calls(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) in names


def _unsafe_torch_load(node: ast.AST) -> bool:
    return _calls(node, "torch.load") and not _is(_argument(node, "weights_only"), True)


def _unsafe_yaml(node: ast.AST) -> bool:
    if _calls(node, "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"):
        return True
    if not _calls(node, "yaml.load", "yaml.load_all"):
        return False
    given = _argument(node, "Loader") or (node.args[1] if len(node.args) > 1 else None)
    return given is None or ast.unparse(given).rpartition(".")[2] not in _SAFE_LOADERS


def _keyword(name: str) -> Callable[[ast.AST], bool]:
    """A keyword that is given as anything but false, in a call or as a key of a dictionary of arguments."""

    def breaks(node: ast.AST) -> bool:
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return any(isinstance(key, ast.Constant) and key.value == name and not _is(value, False) for key, value in pairs)  # fmt: skip
        value = _argument(node, name) if isinstance(node, ast.Call) else None
        return value is not None and not _is(value, False)

    return breaks


@dataclass(frozen=True)
class Rule:
    """Something that no module does."""

    breaks: Callable[[ast.AST], bool]
    example: str
    near: str
    """What looks alike and is allowed."""


RULES = {
    "imports no pickle": Rule(lambda n: _imports(n, _PICKLES), "from ray import cloudpickle", "import json"),
    "loads tensors without pickle": Rule(
        _unsafe_torch_load, "torch.load(p, weights_only=False)", "torch.load(p, weights_only=True)"
    ),
    "loads arrays without pickle": Rule(
        _keyword("allow_pickle"), "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=False)"
    ),
    "loads YAML without constructors": Rule(
        _unsafe_yaml, "yaml.load(t, yaml.Loader)", "yaml.load(t, WrittenLoader)"
    ),
    "runs no code of a checkpoint": Rule(
        _keyword("trust_remote_code"), "{'trust_remote_code': True}", "f(trust_remote_code=False)"
    ),
    "evaluates no text": Rule(
        lambda n: _calls(n, "eval", "exec", "builtins.eval", "builtins.exec"), "eval(text)", "model.eval()"
    ),
    "starts no shell": Rule(
        lambda n: _keyword("shell")(n) or _calls(n, "os.system", "os.popen", "subprocess.getoutput"),
        "subprocess.run(c, shell=True)",
        "subprocess.run(c)",
    ),
    "listens on no outward address": Rule(
        lambda n: isinstance(n, ast.Constant) and n.value in _ALL_ADDRESSES, "bind('0.0.0.0')", "bind('127.0.0.1')"
    ),
    "listens on a named address": Rule(
        lambda n: (
            isinstance(n, ast.Call)
            and _name(n.func).rpartition(".")[2] in ("bind", "create_server", "HTTPServer", "ThreadingHTTPServer")
            and bool(n.args)
            and isinstance(n.args[0], ast.Tuple)
            and _is(n.args[0].elts[0], "")
        ),
        "server.bind(('', 80))",
        "server.bind((HOST, 80))",
    ),
    "leaves Ray's tokens on": Rule(
        lambda n: (
            (isinstance(n, ast.Assign) and any("RAY_AUTH" in ast.unparse(each) for each in n.targets))
            or (_calls(n, "os.environ.pop", "os.environ.setdefault", "os.putenv") and "RAY_AUTH" in ast.unparse(n))
        ),
        "os.environ['RAY_AUTH_MODE'] = 'disabled'",
        "os.environ.get('RAY_AUTH_MODE')",
    ),
    "lets vLLM send no pickled functions": Rule(
        lambda n: isinstance(n, ast.Constant) and n.value == "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION']",
        "os.environ['VLLM_LOGGING_LEVEL']",
    ),
    "makes temporary names safely": Rule(lambda n: _calls(n, "tempfile.mktemp"), "tempfile.mktemp()", "tempfile.mkdtemp()"),
    "extracts no whole archive": Rule(
        lambda n: isinstance(n, ast.Call) and _name(n.func).endswith(".extractall"), "tar.extractall()", "tar.extractfile(m)"
    ),
}  # fmt: skip


@cache
def _parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def _broken(rule: Rule, tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if rule.breaks(node):
            yield getattr(node, "lineno", 0)


@pytest.mark.parametrize("name", RULES)
def test_no_module_breaks_the_rule(name: str) -> None:
    broken = {
        f"{path.relative_to(ROOT)}:{line}" for path in MODULES for line in _broken(RULES[name], _parsed(path))
    }
    assert len(MODULES) > 200 and broken == set()


@pytest.mark.parametrize("name", RULES)
def test_the_rule_finds_its_example_and_nothing_near_it(name: str) -> None:
    assert list(_broken(RULES[name], ast.parse(RULES[name].example)))
    assert not list(_broken(RULES[name], ast.parse(RULES[name].near)))
