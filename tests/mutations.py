"""Small changes to the source of a module, for tests/mutants.py."""

import ast
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
NAMES = {"min": "max", "any": "all", "amin": "amax", "argmin": "argmax", "floor": "ceil"}
NAMES |= {"minimum": "maximum", "zeros_like": "ones_like"}
NAMES |= {new: old for old, new in NAMES.items()}
# A call of such a module is not replaced by the module, which would only raise an error.
MODULES = {"torch", "math", "np", "os", "json", "F", "nn", "comm", "distributed", "box_ops", "self"}
# The text of messages is not mutated.
MESSAGES = {"warning", "info", "warn", "print", "log", "error", "getLogger"}


class Mutant(NamedTuple):
    """A module with one change.

    Attributes:
        key: the function and the change, independent of lines above it.
        line: of the changed statement.
        digest: of the original function.
        tree: of the module; it has the change until the next mutant is generated.
    """

    key: str
    path: Path
    line: int
    digest: str
    tree: ast.Module


def mutants_of(path: Path, name: str) -> Iterator[Mutant]:
    """Yield all mutants of the functions and methods of a module.

    Args:
        name: of the module, in the keys.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen = Counter[str]()
    for function, node in _functions(tree):
        digest = hashlib.sha256(ast.dump(node).encode()).hexdigest()[:12]
        for parent, field, i, old, statement in [*_sites(ast.Module(node.body, []))]:
            for new in _variants(old, parent):
                before, after = (ast.unparse(x).split("\n")[0] for x in (old, new))
                key = f"{name} {function}: {before}  ->  {after}"
                seen[key] += 1
                if seen[key] > 1:
                    key += f"  ({seen[key]})"
                # The original stays as a dead branch, so that closures have the same variables.
                if isinstance(old, ast.stmt):
                    new = ast.If(ast.Constant(True), [new], [old])
                elif isinstance(old, ast.expr):
                    new = ast.IfExp(ast.Constant(True), new, old)
                _put(parent, field, i, ast.fix_missing_locations(ast.copy_location(new, old)))
                yield Mutant(key, path, statement.lineno, digest, tree)
                _put(parent, field, i, old)


def plant(path: Path, tree: ast.Module, functions: Iterable[FunctionType]) -> bool:
    """Replace the code of functions by that in their module's tree; return whether any differs."""
    new = defaultdict(list)
    for code in _codes(compile(tree, str(path), "exec")):
        new[code.co_qualname, code.co_firstlineno].append(code)
    differs = False
    for x in functions:
        found = new[x.__code__.co_qualname, x.__code__.co_firstlineno]
        if len(found) == 1 and found[0] != x.__code__:
            x.__code__ = found[0]
            differs = True
    return differs


class Marks(ast.NodeTransformer):
    """Put ``__reached__[n] = 1`` before each statement of a function.

    Args:
        lines: {(path, line): n}, to which those of this module are added.
    """

    def __init__(self, path: Path, lines: dict[tuple[Path, int], int]):
        self.path, self.lines, self.inside = path, lines, False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        before, self.inside = self.inside, True
        self.generic_visit(node)
        self.inside = before
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody") if self.inside else ():
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [y for x in statements for y in (self._mark(x), x)])
        return node

    def _mark(self, statement: ast.stmt) -> ast.stmt:
        n = self.lines.setdefault((self.path, statement.lineno), len(self.lines))
        mark = ast.parse(f"__reached__[{n}] = 1").body[0]
        for x in ast.walk(mark):
            ast.copy_location(x, statement)
        return mark


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def _sites(node: ast.AST, statement: ast.stmt | None = None) -> Iterator[tuple]:
    """Yield (parent, field, position, node, its statement) of each node that is evaluated, but for
    types and the text of messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "pattern"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            # zip's comparison of lengths is an assertion: sound code is equal without it.
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            inner = child if isinstance(child, ast.stmt) else statement
            yield node, field, i if isinstance(value, list) else None, child, inner
            called = child.func if isinstance(child, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            if not isinstance(child, ast.Raise) and name not in MESSAGES:
                yield from _sites(child, inner)


def _variants(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """Yield changes to one expression or statement, not to its children."""

    def change(**fields: object) -> ast.AST:
        return type(node)(**(dict(ast.iter_fields(node)) | fields))

    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield change(ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op, left=left) if type(op) in SWAPS:
            if not isinstance(left, ast.JoinedStr) and not _is_text(left):
                yield change(op=SWAPS[type(op)]())
        case ast.BoolOp(op=op):
            yield change(op=SWAPS[type(op)]())
        case ast.AugAssign(op=op) if type(op) in SWAPS:
            yield change(op=SWAPS[type(op)]())
            yield ast.Pass()
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.If() | ast.IfExp():
            yield from (change(test=ast.Constant(x)) for x in (True, False))
        case ast.Constant(value=bool(x)):
            yield ast.Constant(not x)
        case ast.Constant(value=int(x)):
            yield ast.Constant(x + 1)
        case ast.Constant(value=float(x)):
            yield ast.Constant(2 * x or 1.0)
        case ast.Constant(value=str(x)):
            yield ast.Constant("XX" + x)
        case ast.Call(func=func, keywords=keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg != "strict":
                    yield change(keywords=[*keywords[:i], *keywords[i + 1 :]])
            match func:
                case ast.Attribute(value=value, attr=name):
                    if name in NAMES:
                        yield change(func=ast.Attribute(value, NAMES[name], ast.Load()))
                    of_module = isinstance(value, ast.Name) and value.id in MODULES
                    if not of_module and not isinstance(parent, ast.Expr):
                        yield value
                case ast.Name(id=name) if name in NAMES:
                    yield change(func=ast.Name(NAMES[name], ast.Load()))
        case ast.Return(value=value) if value and not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Break():
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()
        case ast.comprehension(ifs=ifs):
            for i in range(len(ifs)):
                yield change(ifs=[*ifs[:i], *ifs[i + 1 :]])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _put(parent: ast.AST, field: str, i: int | None, node: ast.AST) -> None:
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def _codes(code: CodeType) -> Iterator[CodeType]:
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield x
            yield from _codes(x)
