"""The single faults that `make mutants` puts into a file, one syntax tree at a time."""

from __future__ import annotations

import ast
import difflib
import functools
import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

COMPARISONS: dict[type, tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type, type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Edit:
    """One change of a syntax tree: what is put into a field of a node, at a place in it where the field is a list."""

    parent: ast.AST
    field: str
    place: int | None
    new: ast.AST

    def exchange(self) -> Edit:
        """Make the change; the edit that takes it back."""
        held = getattr(self.parent, self.field)
        if self.place is None:
            setattr(self.parent, self.field, self.new)
            return Edit(self.parent, self.field, None, held)
        old, held[self.place] = held[self.place], self.new
        return Edit(self.parent, self.field, self.place, old)


@dataclass(frozen=True)
class Mutant:
    """A change, by its number among those of its file; a number of -1 stands for no change."""

    file: str
    number: int
    first: int  # first and last line of what is changed
    last: int
    function: str  # qualified name of the outermost function it lies in; empty: in none
    begins: int  # first line of that function


def swapped(node: ast.AST) -> Iterator[ast.AST]:
    """The node with another operator, number or truth value."""
    match node:
        case ast.Compare(left, operators, right):
            for place, operator in enumerate(operators):
                for other in COMPARISONS[type(operator)]:
                    yield ast.Compare(left, [*operators[:place], other(), *operators[place + 1 :]], right)
        case ast.BinOp(left, operator, right) if type(operator) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(operator)](), right)
        case ast.AugAssign(target, operator, value) if type(operator) in ARITHMETIC:
            yield ast.AugAssign(target, ARITHMETIC[type(operator)](), value)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(_, operand) if not isinstance(operand, ast.Constant):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value or 1.0)


def thinned(node: ast.AST) -> Iterator[ast.AST]:
    """A call without one of its keywords, without a method that takes nothing, with the branches of `where` exchanged."""
    if not isinstance(node, ast.Call):
        return
    for place, keyword in enumerate(node.keywords):
        if not is_left_alone(keyword, ""):
            yield ast.Call(node.func, node.args, node.keywords[:place] + node.keywords[place + 1 :])
    if isinstance(node.func, ast.Attribute):
        if not node.args and not node.keywords and not isinstance(node.func.value, ast.Call):
            yield node.func.value
        if node.func.attr == "where" and len(node.args) == 3:
            condition, yes, no = node.args
            yield ast.Call(node.func, [condition, no, yes], node.keywords)


def removed(node: ast.AST, field: str) -> Iterator[ast.AST]:
    """Nothing in the place of a statement, None in that of a result, a condition negated."""
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
    stored = isinstance(node, ast.Assign) and not names  # a name left out would be missed at once
    if stored or isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break):
        yield ast.Pass()
    if isinstance(node, ast.Return) and not isinstance(node.value, ast.Constant | None):
        yield ast.Return(ast.Constant(None))
    if field in ("test", "ifs") and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)


def is_left_alone(node: ast.AST, field: str) -> bool:
    """Whether a node stays as it is, with all below it: what only types, words, asserts or imports."""
    match node:
        case ast.Assert() | ast.Import() | ast.ImportFrom() | ast.JoinedStr():
            return True
        case ast.keyword("strict" | "stacklevel"):  # a zip's own check; where a warning points
            return True
        case ast.Expr(ast.Constant()) | ast.If(ast.Name("TYPE_CHECKING")) | ast.FunctionDef("__repr__"):
            return True
    return field in ("annotation", "returns", "decorator_list")


def edits(node: ast.AST) -> Iterator[Edit]:
    """Every change below a node, always in the same order."""
    for field, value in ast.iter_fields(node):
        listed = isinstance(value, list)
        for place, child in enumerate(value if listed else [value]):
            if not isinstance(child, ast.AST) or is_left_alone(child, field):
                continue
            for new in (*swapped(child), *thinned(child), *removed(child, field)):
                yield Edit(node, field, place if listed else None, ast.copy_location(new, child))
            if not isinstance(child, ast.Raise):  # an error may be left out, its words are not changed
                yield from edits(child)


def mutants_of(file: str) -> list[Mutant]:
    """The mutants of a file."""
    tree = ast.parse((ROOT / file).read_text())
    spans, found = functions(tree), []
    for number, edit in enumerate(edits(tree)):
        first, last = edit.new.lineno, edit.new.end_lineno or edit.new.lineno  # type: ignore[attr-defined]
        name, begins = next(((name, at) for name, at, body, end in spans if body <= first and last <= end), ("", 0))
        found.append(Mutant(file, number, first, last, name, begins))
    return found


def unchanged(file: str) -> Mutant:
    """A file as it stands, for a check of the method itself: nothing may kill it."""
    return Mutant(file, -1, 1, 10**6, "", 0)


def tree_of(mutant: Mutant) -> ast.Module:
    """The syntax tree of the mutant's file, changed."""
    tree = ast.parse((ROOT / mutant.file).read_text())
    if mutant.number >= 0:
        next(itertools.islice(edits(tree), mutant.number, None)).exchange()
    return tree


def code_of(mutant: Mutant) -> types.CodeType:
    """The code of the mutant's whole file."""
    return compiled(tree_of(mutant), mutant.file)


@functools.cache
def plain(file: str) -> tuple[list[str], Any]:
    """(lines, meaning) of a file as it stands."""
    tree = tree_of(unchanged(file))
    return ast.unparse(tree).splitlines(), meaning(compiled(tree, file))


def change_of(mutant: Mutant) -> str | None:
    """What stood there and what stands there now, "was → is"; None where that compiles to the same."""
    tree, (lines, before) = tree_of(mutant), plain(mutant.file)
    return None if meaning(compiled(tree, mutant.file)) == before else worded(lines, ast.unparse(tree).splitlines())


def compiled(tree: ast.Module, file: str) -> types.CodeType:
    """The code of a file's tree."""
    return compile(ast.fix_missing_locations(tree), str(ROOT / file), "exec", dont_inherit=True)


def meaning(code: types.CodeType) -> Any:
    """What a code object does, without where it stands."""
    parts = tuple(meaning(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, parts


def functions(tree: ast.Module) -> list[tuple[str, int, int, int]]:
    """(qualified name, first line with decorators, first and last line of the body) of the outermost functions."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found.append((prefix + child.name, first, child.body[0].lineno, child.end_lineno or child.lineno))

    visit(tree, "")
    return found


def worded(before: list[str], after: list[str]) -> str:
    """What differs, on one line."""
    lines = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if line[:3] not in ("---", "+++")]
    was, now = ("; ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{was} → {now}"
