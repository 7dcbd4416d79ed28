"""Conditions on an image's columns: from text to a pyarrow expression.

    quality.sharpness > 100 and not quality.broken and style in ["photo", "sketch"]

The text is parsed as Python and taken apart node by node. A node that is not named here is refused, and nothing is ever
run as Python. Columns are judged by their types, so what a condition cannot compare is known before any row is read.
"""

from __future__ import annotations

import ast
import difflib
import json
import keyword
import operator
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flashu.errors import InputError
from manifests.errors import shortened

NUMBER, TEXT, TRUTH, NULL = "a number", "text", "true or false", "null"
EXACT = 2**53  # so far, float64 holds every whole number
MAX_SHOWN = 80  # characters of a condition's part
DEEPEST = 200  # parts of a condition within each other
LITERALS = {"true": True, "false": False, "null": None}
ORDERED = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
EQUAL = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
ARITHMETIC = {ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply, ast.Div: pc.divide}
OTHER_WORDS = {ast.BitAnd: "write and", ast.BitOr: "write or", ast.Invert: "write not"}


@dataclass(frozen=True)
class Condition:
    """True, false or null for each row, by an expression over `columns`."""

    expression: pc.Expression
    columns: frozenset[str]


@dataclass(frozen=True)
class _Value:
    """A part of a condition."""

    node: ast.expr
    kind: str  # one of the constants, or the type of a column that conditions cannot use
    expression: pc.Expression
    whole: bool = False  # a whole number, in int64
    literal: Any = None
    rounded: bool = False  # a column whose numbers float64 may not hold


def parse_condition(text: str, schema: pa.Schema, name: str = "--where") -> Condition:
    """A condition on the columns of `schema`. `quality.NAME` is the column `quality_NAME`; `column["a name"]` is any.

    A comparison with a null value is null, as in SQL; `== null` and `!= null` ask for one. Arithmetic is in float64, as
    are comparisons but those of whole numbers with each other. Lines may be broken anywhere, and end in # comments.
    Raises `InputError`, which begins with `name`, for what cannot be read, what there is no column for, and types that
    do not go together.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise InputError(f"{name} is empty; give a condition, as in quality.sharpness > 100")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{name} is not valid Unicode")
    is_broken = "\n" in text
    source = f"(\n{text}\n)" if is_broken else text
    try:
        parsed = ast.parse(source, mode="eval").body
        parser = _Parser(source, schema)
        expression = parser.truth(parsed, "a condition is true or false")
        if is_broken and parsed.lineno == 1:  # as in a) or (b
            raise _Refused("its parentheses do not match")
    except SyntaxError as error:
        told = "it is written as in Python, with ==, and, or, not, in"
        raise InputError(f"{name} cannot be read {_place(source, error)}; {told}") from None
    except (RecursionError, MemoryError):
        raise InputError(f"{name} is too deeply nested") from None
    except (_Refused, ValueError) as error:
        raise InputError(f"{name}: {error}") from None
    return Condition(expression, frozenset(parser.columns))


def column_name(name: str) -> str:
    """A column as one writes it in a condition."""
    shown = name.removeprefix("quality_")
    is_name = name.isidentifier() and unicodedata.is_normalized("NFKC", name)  # Python reads others as another name
    if is_name and shown != name and shown.isidentifier() and not keyword.iskeyword(shown):
        return f"quality.{shown}"
    is_plain = is_name and name not in LITERALS and not keyword.iskeyword(name)
    return name if is_plain else f"column[{json.dumps(name, ensure_ascii=False)}]"


class _Refused(Exception):  # noqa: N818 - told as an `InputError`
    """Why a part of a condition cannot be used."""


class _Parser:
    def __init__(self, source: str, schema: pa.Schema):
        self.source, self.schema = source, schema
        self.columns: set[str] = set()
        self._depth = 0

    def truth(self, node: ast.expr, why: str) -> pc.Expression:
        value = self.value(node)
        if value.kind != TRUTH:
            raise _Refused(f"{self._text(value.node)} is {value.kind}, and {why}")
        return value.expression

    def value(self, node: ast.expr) -> _Value:
        """Raises `RecursionError` past DEEPEST, whatever Python's own limit is: libraries move it."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise RecursionError
        value = self._value(node)
        self._depth -= 1
        return value

    def _value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Constant(value=literal) if literal is None or isinstance(literal, bool | int | float | str):
                return self._literal(node, literal)
            case ast.Name(id=name) if name in LITERALS:
                return self._literal(node, LITERALS[name])
            case ast.Name(id=name):
                return self._column(node, self._as_written(node, name))
            case ast.Attribute(value=ast.Name(id="quality"), attr=name):
                return self._column(node, f"quality_{self._as_written(node, name)}")
            case ast.Subscript(value=ast.Name(id="column"), slice=ast.Constant(value=str(name))):
                return self._column(node, name)
            case ast.BoolOp():
                return self._and_or(node)
            case ast.UnaryOp(op=ast.Not()):
                negated = self.truth(node.operand, "`not` is for true or false")
                return _Value(node, TRUTH, ~negated)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                return self._signed(node)
            case ast.BinOp() if type(node.op) in ARITHMETIC:
                return self._arithmetic(node)
            case ast.Compare():
                return self._comparison(node)
        raise _Refused(self._why_not(node))

    def _literal(self, node: ast.expr, literal: Any) -> _Value:
        if literal is None:
            return _Value(node, NULL, pc.scalar(pa.scalar(None, pa.bool_())))
        if isinstance(literal, bool):
            return _Value(node, TRUTH, pc.scalar(literal), literal=literal)
        if isinstance(literal, str):
            return _Value(node, TEXT, pc.scalar(literal), literal=literal)
        if isinstance(literal, int) and not -(2**63) <= literal < 2**63:
            raise _Refused(f"{self._text(node)} is not between -2**63 and 2**63 - 1, as whole numbers are here")
        return _Value(node, NUMBER, pc.scalar(literal), isinstance(literal, int), literal)

    def _as_written(self, node: ast.expr, name: str) -> str:
        """Python reads some letters as others: `ﬁ` as `fi`, which may be another column."""
        if not self.source.isascii() and not ast.get_source_segment(self.source, node).endswith(name):
            raise _Refused(f'{self._text(node)} holds letters that Python replaces; write column["…"] around the name')
        return name

    def _column(self, node: ast.expr, name: str) -> _Value:
        if name not in self.schema.names:
            raise _Refused(self._unknown(node))
        self.columns.add(name)
        expression, type_ = pc.field(name), self.schema.field(name).type
        if pa.types.is_dictionary(type_):
            type_ = type_.value_type
            expression = expression.cast(type_)
        if pa.types.is_boolean(type_):
            return _Value(node, TRUTH, expression)
        if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
            return _Value(node, TEXT, expression.cast(pa.string()))
        if pa.types.is_integer(type_) and type_ != pa.uint64():
            return _Value(node, NUMBER, expression.cast(pa.int64()), whole=True)
        if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
            return _Value(node, NUMBER, _as_float(expression), rounded=not pa.types.is_floating(type_))
        return _Value(node, f"of type {type_}", expression)

    def _and_or(self, node: ast.BoolOp) -> _Value:
        word = "and" if isinstance(node.op, ast.And) else "or"
        parts = [self.truth(part, f"`{word}` joins what is true or false") for part in node.values]
        join = pc.and_kleene if word == "and" else pc.or_kleene
        return _Value(node, TRUTH, _balanced(join, parts))

    def _signed(self, node: ast.UnaryOp) -> _Value:
        if isinstance(node.operand, ast.Constant) and type(node.operand.value) in (int, float):
            negative = isinstance(node.op, ast.USub)
            return self._literal(node, -node.operand.value if negative else node.operand.value)
        number = self._number(node.operand)
        signed = pc.negate(number) if isinstance(node.op, ast.USub) else number
        return _Value(node, NUMBER, signed)

    def _arithmetic(self, node: ast.BinOp) -> _Value:
        result = ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right))
        return _Value(node, NUMBER, result)

    def _number(self, node: ast.expr) -> pc.Expression:
        value = self.value(node)
        if value.kind != NUMBER:
            raise _Refused(f"{self._text(value.node)} is {value.kind}, and arithmetic is for numbers")
        return _as_float(value.expression)  # in which nothing overflows, and division by zero is no error

    def _comparison(self, node: ast.Compare) -> _Value:
        sides = [node.left, *node.comparators]
        parts = [
            self._membership(left, op, right) if isinstance(op, ast.In | ast.NotIn) else self._compared(left, op, right)
            for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
        ]
        return _Value(node, TRUTH, _balanced(pc.and_kleene, parts))

    def _compared(self, left_node: ast.expr, op: ast.cmpop, right_node: ast.expr) -> pc.Expression:
        left, right = self.value(left_node), self.value(right_node)
        if NULL in (left.kind, right.kind):
            if type(op) in ORDERED:
                raise _Refused("null is neither more nor less than anything; ask for it with == null or != null")
            other = left if right.kind == NULL else right
            return other.expression.is_null() if isinstance(op, ast.Eq | ast.Is) else other.expression.is_valid()
        if isinstance(op, ast.Is | ast.IsNot):
            raise _Refused(f"`is` asks for null; beside {self._text(right.node)}, write == or !=")
        self._check_alike(left, right)
        if left.kind == TRUTH and type(op) in ORDERED:
            raise _Refused(f"{self._text(left.node)} is true or false, and neither has more or less")
        one, other = left.expression, right.expression
        if left.whole != right.whole:
            one, other = _as_float(one), _as_float(other)
        return (EQUAL | ORDERED)[type(op)](one, other)

    def _membership(self, node: ast.expr, op: ast.In | ast.NotIn, choices: ast.expr) -> pc.Expression:
        if not isinstance(choices, ast.List | ast.Tuple | ast.Set):
            raise _Refused(f"`in` takes a list, as in [1, 2]; {self._text(choices)} is none")
        value, listed = self.value(node), [self.value(choice) for choice in choices.elts]
        self._check_usable(value)
        known = [choice for choice in listed if choice.kind != NULL]
        for choice in known:
            if choice.literal is None:
                told = f"a list of `in` holds numbers, texts, true, false and null; not {self._text(choice.node)}"
                raise _Refused(told)
            self._check_alike(value, choice)
        literals, expression = [choice.literal for choice in known], value.expression
        type_ = {NUMBER: pa.int64(), TEXT: pa.string(), TRUTH: pa.bool_()}[value.kind]
        if value.kind == NUMBER and not (value.whole and all(choice.whole for choice in known)):
            type_, literals = pa.float64(), [literal + 0.0 for literal in literals]
            expression = pc.add(_as_float(expression), 0.0)  # of -0.0 it makes 0.0, which `isin` tells apart
        of_null = pa.scalar(True if len(known) < len(listed) else None, pa.bool_())
        is_in = pc.if_else(value.expression.is_valid(), expression.isin(pa.array(literals, type_)), of_null)
        return is_in if isinstance(op, ast.In) else ~is_in

    def _check_alike(self, left: _Value, right: _Value) -> None:
        self._check_usable(left)
        self._check_usable(right)
        if left.kind != right.kind:
            other = f"{self._text(right.node)}, which is {right.kind}"
            raise _Refused(f"{self._text(left.node)} is {left.kind}, and cannot be compared with {other}")
        for column, other in ((left, right), (right, left)):
            if column.rounded and other.whole and abs(other.literal or 0) >= EXACT:
                told = f"is rounded, and cannot be compared with a whole number as large as {other.literal}"
                raise _Refused(f"{self._text(column.node)} {told}; write {float(other.literal)!r} for about that")

    def _check_usable(self, value: _Value) -> None:
        if value.kind not in (NUMBER, TEXT, TRUTH):
            what = "only numbers, texts, true and false can be compared"
            raise _Refused(f"{self._text(value.node)} is {value.kind}; {what}")

    def _unknown(self, node: ast.expr) -> str:
        known = [column_name(name) for name in self.schema.names]
        near = difflib.get_close_matches(self._text(node), known, n=1, cutoff=0.5)
        # A metric without its prefix is nearer by its last part.
        near = [name for name in known if name.split(".")[-1] == self._text(node).split(".")[-1]] or near
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"there is no column {self._text(node)}{hint} There are: {', '.join(known)}"

    def _why_not(self, node: ast.expr) -> str:
        text = self._text(node)
        if isinstance(node, ast.Call):
            return f"functions cannot be called: {text}"
        if isinstance(node, ast.Attribute):
            return f"{text} is no column: only those of quality have a dot, as in quality.sharpness"
        if isinstance(node, ast.BinOp | ast.UnaryOp):
            instead = OTHER_WORDS.get(type(node.op), "there are +, -, * and /")
            return f"the operator of {text} is not known here; {instead}"
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return f"the list {text} can stand only after `in`"
        return f"{text} cannot be part of a condition ({type(node).__name__})"

    def _text(self, node: ast.expr) -> str:
        """As it was written, shortened."""
        text = ast.get_source_segment(self.source, node) or ast.unparse(node)
        return shortened(" ".join(text.split()), MAX_SHOWN)


def _as_float(number: pc.Expression) -> pc.Expression:
    return number.cast(pa.float64(), safe=False)  # large whole numbers are rounded


def _balanced(join: Callable, parts: Sequence[pc.Expression]) -> pc.Expression:
    """Joined as a tree of little depth: pyarrow descends into a long chain once a link."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return join(_balanced(join, parts[:middle]), _balanced(join, parts[middle:]))


def _place(source: str, error: SyntaxError) -> str:
    what = error.msg.split(" (")[0]  # without Python's own word on the line
    lines = source.split("\n")
    line, at = (error.lineno or 0) - 1, (error.offset or 0) - 1
    own = [line] if len(lines) == 1 else range(1, len(lines) - 1)  # the others are the brackets around it
    if line not in own or not 0 <= at < len(lines[line]):
        return f"at its end: {what}"
    place = f"at character {at + 1}" + (f" of line {line}" if len(lines) > 1 else "")
    return f"{place}, before {lines[line][at : at + 20]!r}: {what}"
