"""The plan of the house: who imports whom, read from the source of every module of v4jax.

Imports inside functions count as well: they hide a circle, and do not open it.
"""

import ast
import functools
import graphlib
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# From the ground up. Each imports only what stands before it.
FLOORS = (
    "errors",
    "reprs",
    "tables",
    "platforms",
    "chips",
    "block_sizes",
    "extras",
    "lifeline",
    "workers",
    "files",
    "quant",
    "ops",
    "sharding",
    "kernels",
    "quantities",
    "draft_sizes",
    "config",
    "named_configs",
    "weights",
    "hf",
    "model",
    "streamed",
    "accounting",
    "datasets",
    "checkpoints",
    "infer",
    "engine",
    "chat",
    "serve",
    "train",
    "plan",
    "eval",
    "cli",
)


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module of v4jax -> the modules that it imports; of other packages their first name."""
    paths = {_name(path): path for path in (ROOT / "v4jax").rglob("*.py")}
    return {name: set(_imported(path, paths)) - {name} for name, path in paths.items()}


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _imported(path, ours):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # `from v4jax.errors import InputError` imports the module v4jax.errors.
            while name not in ours and "." in name:
                name = name.rpartition(".")[0]
            yield name


def floor(module: str) -> str:
    """`model` of v4jax.model.rope, `errors` of v4jax.errors."""
    return module.split(".")[1]


def within() -> list[tuple[str, str]]:
    """Every (module, imported module) of which both belong to a file or package on a floor."""
    entrances = ("v4jax", "v4jax.__main__")
    return [
        (module, other)
        for module, others in imports().items()
        for other in others
        if module not in entrances and other.startswith("v4jax.")
    ]


def test_every_file_has_its_floor():
    assert {floor(module) for pair in within() for module in pair} <= set(FLOORS)
    files = {path.stem for path in (ROOT / "v4jax").iterdir() if path.suffix == ".py"}
    packages = {path.parent.name for path in (ROOT / "v4jax").glob("*/__init__.py")}
    assert (files | packages) - {"__init__", "__main__"} == set(FLOORS)


def test_no_circle():
    graph = {
        module: {other for other in others if other.startswith("v4jax")}
        for module, others in imports().items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_no_import_runs_up():
    height = {name: i for i, name in enumerate(FLOORS)}
    up = [pair for pair in within() if height[floor(pair[0])] < height[floor(pair[1])]]
    assert not up


def test_nothing_imports_the_command_line():
    entrance = "v4jax.__main__"
    found = [
        (module, other)
        for module, others in imports().items()
        for other in others
        if other.startswith("v4jax.cli") and module != entrance and floor(module) != "cli"
    ]
    assert not found


def test_the_package_needs_nothing_that_uses_it():
    users = {"tests", "tools", "experiments", "notebooks", "configs", "examples"}
    assert not users & {other.split(".")[0] for others in imports().values() for other in others}


def test_public_names_come_from_modules_that_are_there():
    """The public names, which v4jax/__init__.py imports when they are first used."""
    tree = ast.parse((ROOT / "v4jax" / "__init__.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_MODULES"
    )
    assert set(ast.literal_eval(table).values()) <= imports().keys()


def test_every_package_is_installed():
    """An editable install has them all anyway: only a built one lacks what is not listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "v4jax").rglob("__init__.py")}
    there = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) - {"v4jax.configs"} == there  # which is configs/, beside the package
