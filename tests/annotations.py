"""An import hook that checks every annotation of a package at each call.

Functions that annotate arrays get jaxtyping's check, in which one letter is one size throughout a
call; it takes about 50 us, so all others get beartype's own, which takes about one. A dataclass is
checked when it is made. An int counts as a float, as it does to mypy.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import pathlib
import sys
import typing
from importlib import machinery
from unittest import mock

import beartype
import jaxtyping

_typed = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
)
_shaped = jaxtyping.jaxtyped(typechecker=_typed)


def checked(thing):
    """A function that checks its arguments and its result, or a class whose making is checked."""
    hints = inspect.get_annotations(thing).values()
    if any(map(_has_arrays, hints)):
        return _shaped(thing)
    if not isinstance(thing, type):
        return _typed(thing) if hints else thing
    if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        thing.__init__ = _typed(thing.__init__)
    return thing


def _has_arrays(hint):
    if isinstance(hint, str):  # for type checkers only, maybe: jaxtyping passes those over
        return True
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_arrays, typing.get_args(hint)))


class _Decorate(ast.NodeTransformer):
    """Puts `checked` under a function's other decorators, and over a class's."""

    # by way of sys.modules, so that no name of the module's own is taken
    mark = f"__import__('sys').modules[{__name__!r}].checked"

    def visit_FunctionDef(self, node):
        node.decorator_list.append(ast.parse(self.mark, mode="eval").body)
        return self.generic_visit(node)

    def visit_ClassDef(self, node):
        node.decorator_list.insert(0, ast.parse(self.mark, mode="eval").body)
        return self.generic_visit(node)


_VERSION = hashlib.md5(pathlib.Path(__file__).read_bytes()).hexdigest()


class _Loader(machinery.SourceFileLoader):
    def source_to_code(self, data, path, *, _optimize=-1):
        tree = _Decorate().visit(ast.parse(data, path))
        return super().source_to_code(ast.fix_missing_locations(tree), path, _optimize=_optimize)

    def exec_module(self, module):
        # bytecode of its own beside the plain one
        def place(path, *ignored, **options):
            return importlib.util.cache_from_source(path, optimization=f"typed{_VERSION}")

        with mock.patch("importlib._bootstrap_external.cache_from_source", place):
            return super().exec_module(module)


class _Finder:
    """For `sys.meta_path`: imports the packages named with their annotations checked."""

    def __init__(self, *packages: str):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check(package: str) -> None:
    """Check the annotations of a package that is not imported yet."""
    assert package not in sys.modules, f"{package}: imported too early to be checked"
    sys.meta_path.insert(0, _Finder(package))
