"""The statements of the package that put streams in order, found in its source, and taken out."""

import ast
import importlib
import inspect
from dataclasses import dataclass
from types import CodeType

from tests.support.places import ROOT

ORDERS = {"wait_event", "wait_stream", "record_stream", "synchronize"}


@dataclass(frozen=True)
class Order:
    """A statement that puts two streams, or a stream and the host, in order."""

    file: str
    function: str
    line: int
    what: str

    def __str__(self):
        return f"{self.file.removeprefix('partialfc/')} {self.function} {self.what}"

    def code_without(self):
        """The function's code, where the statement does nothing."""
        tree = ast.parse((ROOT / self.file).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and node.lineno == self.line:
                node.value = ast.Constant(None)
        ast.fix_missing_locations(tree)
        return _code_of(compile(tree, str(ROOT / self.file), "exec"), self.function)

    @property
    def of(self):
        """The function itself, without its decorators."""
        found = importlib.import_module(self.file.removesuffix(".py").replace("/", "."))
        for part in self.function.split("."):
            found = getattr(found, part)
        return inspect.unwrap(found)


def _code_of(code, function):
    for one in code.co_consts:
        if isinstance(one, CodeType):
            if one.co_qualname == function:
                return one
            if found := _code_of(one, function):
                return found
    return None


def orders_in(file):
    """Yield those of a file of the repository."""
    yield from _orders_in(ast.parse((ROOT / file).read_text()), file)


def _orders_in(node, file, inside=()):
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef)
        call = child.value if isinstance(child, ast.Expr) else None
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ORDERS:
            yield Order(file, ".".join(inside), child.lineno, call.func.attr)
        yield from _orders_in(child, file, (*inside, child.name) if named else inside)
