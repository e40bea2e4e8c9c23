"""Promise: no module of xorz imports another one's private names, and none imports, however far around, itself."""

import ast
from pathlib import Path

import xorz

ROOT = Path(xorz.__file__).parent
# Where vLLM itself is hooked, its own private names are listed and looked at (`vllm/hooks.py`).
OURS = "xorz"


def modules():
    """Name -> syntax tree, of every module of the package."""
    out = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = [OURS, *path.relative_to(ROOT).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        out[name] = (ast.parse(path.read_text()), path.name == "__init__.py")
    return out


def imported(name, tree, is_package, known, nodes):
    """(module, name in it or None) of each import of ours among these nodes."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == OURS:
                    yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            front = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*front, *([node.module] if node.module else [])])
            if module.split(".")[0] != OURS:
                continue
            for alias in node.names:
                inside = f"{module}.{alias.name}"
                yield (inside, None) if inside in known else (module, alias.name)


def at_the_top(tree):
    """What is run when the module is imported: not what stands in functions or under TYPE_CHECKING."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from (
            n for n in ([node] if not isinstance(node, (ast.If, ast.Try, ast.With)) else ast.walk(node))
        )


def test_nothing_private_is_imported_across_modules():
    known = modules()
    found = [
        f"{name} imports {what} of {module}"
        for name, (tree, is_package) in known.items()
        for module, what in imported(name, tree, is_package, known, ast.walk(tree))
        if what is not None and what.startswith("_") and not what.startswith("__")
    ]
    assert not found, found


def test_nothing_private_is_read_of_another_module():
    """`other._name`, where `other` is a module of ours."""
    known, found = modules(), []
    for name, (tree, is_package) in known.items():
        held = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    for module, what in imported(name, tree, is_package, known, [node]):
                        if what is None and module.endswith(f".{alias.name}"):
                            held[alias.asname or alias.name] = module
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in held:
                if node.attr.startswith("_") and not node.attr.startswith("__"):
                    found.append(f"{name} reads {node.attr} of {held[node.value.id]}")
    assert not found, found


def test_no_module_imports_itself_around_others():
    known = modules()
    edges = {
        name: {
            m
            for m, _ in imported(name, tree, is_package, known, at_the_top(tree))
            if m in known and m != name
        }
        for name, (tree, is_package) in known.items()
    }
    assert sum(map(len, edges.values())) > 60
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(edges[name]):
                visit(other)
            done.add(path.pop())

    for name in edges:
        visit(name)


def test_the_checks_notice_what_they_look_for():
    known = {"xorz": None, "xorz.a": None, "xorz.serve": None, "xorz.serve.b": None}
    tree = ast.parse(
        "from .a import _x\nfrom ..a import _y, z\nfrom .. import a\nimport xorz.a\ndef f():\n    from . import b"
    )
    got = list(imported("xorz.serve.b", tree, False, known, ast.walk(tree)))
    assert ("xorz.a", "_y") in got and ("xorz.a", None) in got and ("xorz.serve.b", None) in got
    assert ("xorz.serve.a", "_x") in got
    assert len(list(imported("xorz.serve.b", tree, False, known, at_the_top(tree)))) == 5
