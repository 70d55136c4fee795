"""Which names a cell needs from the cells before it, and which it gives to those after it; read off, not run.

Python's scopes matter here: a loop variable of a comprehension belongs to nobody else, a function's own names stay in
it, and what a function's body uses must only exist when the cell is done. Attributes and items are no names: that a
cell changes an object that another one made can only be seen by running both.
"""

import ast
from collections.abc import Iterable

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def needs_and_gives(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell uses and did not make (builtins among them), and those it makes."""
    reader = _Reader()
    reader.visit(ast.parse(source))
    return reader.needed | (reader.later - reader.given), reader.given


class _Reader(ast.NodeVisitor):
    """Walks through one scope in the order in which it would run."""

    def __init__(self) -> None:
        self.given, self.needed, self.later = set[str](), set[str](), set[str]()

    def each(self, nodes: Iterable[ast.AST | None]) -> None:
        """Visit several parts, in the order given."""
        for node in nodes:
            if node is not None:
                self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.given.add(node.id)
        elif node.id not in self.given:
            self.needed.add(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.each([node.value, *node.targets])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.each([node.value, node.target])

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.each([node.value, node.target])

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name) and node.target.id not in self.given:
            self.needed.add(node.target.id)
        self.each([node.value, node.target])

    def visit_For(self, node: ast.For) -> None:
        self.each([node.iter, node.target, *node.body, *node.orelse])

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.given |= {alias.asname or alias.name.split(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.given |= {node.name} if node.name else set()
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.each([*node.decorator_list, *node.bases])
        self._scope(node.body, set())
        self.given.add(node.name)

    def _function(self, node: FUNCTION) -> None:
        """Defaults and decorators count where the function is made, its body when it is called."""
        a = node.args
        self.each([*a.defaults, *a.kw_defaults, *getattr(node, "decorator_list", [])])
        own = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg}
        self._scope(node.body if isinstance(node.body, list) else [node.body], own)
        if not isinstance(node, ast.Lambda):
            self.given.add(node.name)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def _comprehension(self, node: COMPREHENSION) -> None:
        inner = _Reader()
        for loop in node.generators:
            inner.each([loop.iter, loop.target, *loop.ifs])
        inner.each([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])
        self.needed |= inner.needed - self.given
        self.later |= inner.later

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _scope(self, body: Iterable[ast.AST], own: set[str]) -> None:
        """A body that runs later, with names of its own."""
        inner = _Reader()
        inner.given |= own
        inner.each(body)
        self.later |= (inner.needed | inner.later) - inner.given
