"""Checks annotations of v4jax in tests: shapes and types at every call of an annotated function.

jaxtyping's own hook wraps every function, those without an annotation too, and makes the wrappers
of a function within a function again at each call: half of what tests of checkpoints took. Here a
function is wrapped where an annotation says something: by jaxtyping where that is a shape, else by
beartype alone.
"""

import ast
import dataclasses
import sys
import typing
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import decode_source

import jaxtyping
from beartype import beartype

_PACKAGE = "v4jax"
_NAME = "__checked__"


def install():
    """Has all modules of v4jax that are imported from now on checked."""
    assert _PACKAGE not in sys.modules, "v4jax was imported before its annotations are checked"
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != _PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname):
        path = self.get_filename(fullname)
        tree = _Decorating().visit(ast.parse(decode_source(self.get_data(path))))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module):
        module.__dict__[_NAME] = checked
        super().exec_module(module)


class _Decorating(ast.NodeTransformer):
    """Decorates classes, for those that are dataclasses, and functions with annotations."""

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.decorator_list.insert(0, _decorator(node))  # after @dataclass
        return node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        of = node.args
        arguments = [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg]
        if node.returns is not None or any(a is not None and a.annotation for a in arguments):
            node.decorator_list.append(_decorator(node))  # before jax.jit and the like
        return node


def _decorator(node):
    return ast.copy_location(ast.Name(_NAME, ast.Load()), node)


def checked(what):
    """A function whose annotations are checked; of a dataclass, the function that makes one."""
    if isinstance(what, type):
        if dataclasses.is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = checked(what.__init__)
        return what
    try:
        hints = typing.get_type_hints(what, include_extras=True)
    except NameError:  # of a module that the function imports itself
        return jaxtyping.jaxtyped(what, typechecker=beartype)
    if any(map(_is_shaped, hints.values())):
        return jaxtyping.jaxtyped(what, typechecker=beartype)
    what.__annotations__ = hints
    return beartype(what)


def _is_shaped(hint):
    """Whether jaxtyping has to compare sizes."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_is_shaped, typing.get_args(hint)))
