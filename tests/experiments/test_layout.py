"""The package is laid out as its folders say: no circles, no name twice; what others call is documented."""

import ast
from collections import Counter
from graphlib import TopologicalSorter

import pytest

from experiments.records.provenance import REPOSITORY

FILES = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "experiments").rglob("*.py"))
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
TREES = {name: ast.parse((REPOSITORY / path).read_text(encoding="utf-8")) for name, path in MODULES.items()}
# What may be imported where: a folder knows those before it.
ORDER = [
    *("errors", "dataclass_io", "plugins", "table_formats", "data_io", "integrations", "tasks", "records"),
    *("optimizers", "config", "training", "launch", "analysis", "theory", "estimate", "bench", "tuning"),
    *("challenge", "cli"),
]


def imports(name: str) -> set[tuple[str, str]]:
    """Module and name of everything that a module imports from the package."""
    found = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (parent, node.module) if part)
            found |= {(source, each.name) for each in node.names if source.split(".")[0] == "experiments"}
    return found


def imported_modules(name: str) -> set[str]:
    return {f"{source}.{each}" if f"{source}.{each}" in MODULES else source for source, each in imports(name)}


def called_elsewhere() -> list[tuple[str, ast.FunctionDef]]:
    """The functions of modules that other modules use."""
    used = set()
    for name, tree in TREES.items():
        used |= imports(name)
        modules = {each: f"{source}.{each}" for source, each in imports(name) if f"{source}.{each}" in MODULES}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                used.add((modules[node.value.id], node.attr))
    return [
        (name, node)
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and (name, node.name) in used
    ]


def test_no_import_goes_in_a_circle():
    TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_those_before_it(folder):
    names = [name for name in MODULES if name.split(".")[1:2] == [folder]]
    assert names
    known = {module.split(".")[1] for name in names for module in imported_modules(name)}
    assert known <= set(ORDER[: ORDER.index(folder) + 1])


def test_analysis_knows_nothing_that_runs():
    names = [name for name in MODULES if name.startswith("experiments.analysis.")]
    known = {module.split(".")[1] for name in names for module in imported_modules(name)}
    assert known == {"analysis", "dataclass_io", "errors", "records", "table_formats"}


def test_no_folder_has_more_than_a_dozen_modules():
    counts = Counter(path.parent for path in FILES if path.stem not in ("__init__", "__main__"))
    assert max(counts.values()) <= 12


def test_no_two_modules_have_the_same_name():
    counts = Counter(path.stem for path in FILES if path.stem not in ("__init__", "__main__"))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(("module", "function"), called_elsewhere(), ids=lambda value: getattr(value, "name", value))
def test_a_function_that_others_call_documents_arguments_and_result(module, function):
    text = ast.get_docstring(function) or ""
    arguments = function.args
    if function.name == "main" or function.name.endswith("_command"):  # a command line: the options document themselves
        return
    if arguments.args or arguments.kwonlyargs or arguments.vararg:
        assert "Args:" in text
    if function.returns is not None and ast.unparse(function.returns) != "None":
        assert "Returns:" in text or "Yields:" in text
