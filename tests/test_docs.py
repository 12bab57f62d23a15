"""README and docs/ name what there is: paths, commands with their flags, public names, examples."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import v4jax
from v4jax.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "v4jax|configs|docs|experiments|notebooks|tests|tools"
# Flags that commands have and do not list.
FOREIGN = {"--help"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pages
def test_every_path_is_there(page):
    found = re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w", page.read_text())
    assert not sorted({path for path in found if not (ROOT / path).exists()})


def test_every_file_of_the_readme_tree_is_there():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    here = {path.name for path in ROOT.rglob("*.py")}
    assert set(re.findall(r"\b[a-z_]+\.py\b", tree)) <= here


@pages
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_commands_have_flags_that_there_are(capsys):
    flags = {name: _flags(name, capsys) for name in main.SUBCOMMANDS}
    for page in PAGES:
        text = page.read_text()
        for command in re.findall(r"v4jax ([a-z]+\b.*)", _joined("\n".join(_blocks(text, "")))):
            name, *words = command.split("#")[0].split("&&")[0].split()
            assert name in flags, f"{page.name}: v4jax {name}"
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            given = {flag for flag in given if not flag.startswith("--config.")}
            assert given <= flags[name], f"{page.name}: {command}"
        inline = re.findall(r"`(--(?!config\.)\w+)", text)
        assert set(inline) <= set().union(*flags.values(), FOREIGN), page.name


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    paths = [path.rpartition(".") for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    found = {name: getattr(importlib.import_module(module), name) for module, _, name in paths}
    assert all(found[name] is getattr(v4jax, name) for name in v4jax.__all__)


@pytest.mark.slow  # loads and compiles small models, a minute on two cores
@pytest.mark.parametrize(
    "page",
    [
        "getting_started",
        "checkpoints",
        "generation",
        "engine",
        "lens",
        "evaluate",
        "training",
        "meshes",
    ],
)
def test_the_examples_of_a_page_run(page):
    code = "\n".join(_blocks((ROOT / "docs" / f"{page}.md").read_text(), "python"))
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"} if page == "meshes" else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | eight
    )
    assert done.returncode == 0, done.stderr


def _blocks(text, language):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for found, block in blocks if found == language]


def _joined(text):
    """Lines that end in a backslash, with what follows them."""
    return re.sub(r"\\\n\s*", " ", text)


def _flags(name, capsys):
    assert main.main(["v4jax", name, "--help"]) == 0
    return set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE))
