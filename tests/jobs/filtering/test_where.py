"""Conditions on columns: what they say of each row, and what they are refused for."""

import pyarrow as pa
import pytest

from flashu.errors import InputError
from jobs.filtering.choice import KEPT, NULL, WHERE, Filter, Rules
from jobs.filtering.where import column_name, parse_condition

BIG = 2**63 - 1
TABLE = pa.table(
    {
        "image_index": pa.array([0, 0, 0, 0], pa.int32()),
        "width": pa.array([1, 2, None, 4], pa.int32()),
        "style": ["a", None, "c", "d"],
        "quality_broken": [True, None, False, True],
        "quality_sharpness": [1.5, float("nan"), None, 3.0],
        "class": [1, 2, 3, 4],
        "a score": pa.array([1, 2, 3, 4], pa.float32()),
        "tags": [["a"], [], None, ["b"]],
        "seed": [BIG, BIG - 1, 0, None],
        "price": pa.array([1, 2, 3, None], pa.decimal128(5, 2)),
        "count": pa.array([1, 2, 2**64 - 1, None], pa.uint64()),
        "kind": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "text": pa.array(["a", "b", None, "a"], pa.large_string()),
        "when": pa.array([0, 1, 2, 3], pa.timestamp("s")),
        "zero": [0.0, -0.0, None, 1.0],
        "fi": [1, 2, 3, 4],
        "ﬁ": [4, 3, 2, 1],
        "true": [False, True, None, False],
        "note": ["a b", "a\u2028b", "a#b", "a\nb"],
    }
)
MEANING = {KEPT: "T", WHERE: "f", NULL: "-"}


def holds(condition):
    """T, f or - (null) for each row."""
    rules = Rules(Filter(where=condition), TABLE.schema)
    return "".join(MEANING[fate] for fate in rules.judge(TABLE.select(list(rules.columns))).tolist())


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("width > 1", "fT-T"),
        ("width >= 2 and width < 4", "fT-f"),
        ("1 < width <= 2", "fT-f"),
        ("width != 2", "Tf-T"),
        ("width == 2.0", "fT-f"),
        ("2 == width", "fT-f"),
        ("quality.broken", "T-fT"),
        ("not quality.broken", "f-Tf"),
        ("quality_broken == false", "f-Tf"),
        ("quality.sharpness > 1 and not quality.broken", "ff-f"),
        ("quality.sharpness > 2", "ff-T"),
        ("quality.broken or width == 2", "TT-T"),  # true or null is true, false or null is null
        ("quality.broken and width > 0", "T-fT"),
        ('style == "a"', "T-ff"),
        ("style < 'c'", "T-ff"),
        ("style in ['a', \"d\"]", "T-fT"),
        ("style not in ['a', 'd']", "f-Tf"),
        ("style in ('a', null)", "TTff"),
        ("width in [1, 4]", "Tf-T"),
        ("width in [1.0, -2]", "Tf-f"),
        ("width in []", "ff-f"),
        ("quality.broken in [true]", "T-fT"),
        ("style == null", "fTff"),
        ("style != null", "TfTT"),
        ("null == style", "fTff"),
        ("quality.broken is None", "fTff"),
        ("tags is not null", "TTfT"),
        ("when == null", "ffff"),
        ("quality.sharpness == null", "ffTf"),  # nan is a number here
        ("width + 1 == 3", "fT-f"),
        ("-width < -1", "fT-T"),
        ("width * 2 - 1 > 2", "fT-T"),
        ("3 / width > 1", "TT-f"),
        ("width / 0 > 1e300", "TT-T"),
        ("(width + column['class']) * 2 > 6", "fT-T"),
        ('column["a score"] >= 3', "ffTT"),
        (f"seed == {BIG}", "Tff-"),  # which float64 would round
        (f"seed in [{BIG}]", "Tff-"),
        ("seed > 1e18", "TTf-"),
        ("seed / 2 > 1", "TTf-"),
        ("price > 1.5", "fTT-"),
        ("price > 1", "fTT-"),
        ("count > 3", "ffT-"),
        ('kind == "a"', "Tf-T"),
        ('text in ["a"]', "Tf-T"),
        ("true", "TTTT"),
        ("1 > 2", "ffff"),
        ("quality.broken == null or true", "TTTT"),
        ("width >\n 1", "fT-T"),
        (" width > 1 ", "fT-T"),
        ("width > 1\r\n  and style == 'd'", "f-fT"),
        ("width > 1 # and more\nor style == 'a'", "TT-T"),
        ("width > 1 # or style == 'a'", "fT-T"),
        ("note == 'a\u2028b'", "fTff"),
        ("note ==\n'a#b'", "ffTf"),
        ('note == """a\nb"""', "fffT"),
        ("zero == 0", "TT-f"),
        ("zero in [0]", "TT-f"),
        ("zero in [-0.0, 5]", "TT-f"),
        ("zero * -1 in [0]", "TT-f"),
        ("fi == 1", "Tfff"),
        ('column["ﬁ"] == 1', "fffT"),
        ("true or true", "TTTT"),
        ('column["true"]', "fT-f"),
        ("count in [3, 2]", "fTf-"),
        ("count > 1e18", "ffT-"),
        (" or ".join(f"width == {number}" for number in range(1, 3000, 2)), "Tf-f"),
        (f"width in {list(range(0, 100_000, 2))}", "fT-T"),
    ],
)
def test_a_condition_is_true_false_or_null_for_each_row(condition, expected):
    assert holds(condition) == expected


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("", "--where is empty; give a condition"),
        ("width >", "--where cannot be read at its end"),
        ("width > 1 AND style", "--where cannot be read at character 11, before 'AND style'"),
        ("width = 3", "--where cannot be read at character 7, before '= 3'"),
        ("style > 'x", "unterminated string literal"),
        ("(width > 1", "'(' was never closed"),
        ("class > 1", "--where cannot be read at character 1"),
        ("(" * 300 + "true" + ")" * 300, "too many nested parentheses"),
        ("not " * 5000 + "true", "--where is too deeply nested"),
        ("+".join("1" * 600) + " > 0", "--where is too deeply nested"),
        ("style == '\ud800'", "--where is not valid Unicode"),
        ("quality.sharpnes > 1", "there is no column quality.sharpnes; did you mean quality.sharpness? There are: "),
        ("sharpness > 1", "there is no column sharpness; did you mean quality.sharpness?"),
        ("with_ > 1", "there is no column with_; did you mean width?"),
        ("zzz > 1", 'there is no column zzz. There are: image_index, width, style, quality.broken, '),
        ('column["b score"] > 1', 'there is no column column["b score"]; did you mean column["a score"]?'),
        ("quality > 1", "there is no column quality"),
        ("width > nan", "there is no column nan"),
        ('width > "a"', 'width is a number, and cannot be compared with "a", which is text'),
        ("style > 3", "style is text, and cannot be compared with 3, which is a number"),
        ("quality.broken == 1", "quality.broken is true or false, and cannot be compared with 1, which is a number"),
        ("style in [1]", "style is text, and cannot be compared with 1"),
        ("width in ['1']", "width is a number, and cannot be compared with '1'"),
        ("tags == 'a'", "tags is of type list<"),
        ("when > 3", "when is of type timestamp[s]; only numbers, texts, true and false can be compared"),
        ("width", "width is a number, and a condition is true or false"),
        ("'a'", "'a' is text, and a condition is true or false"),
        ("null", "null is null, and a condition is true or false"),
        ("quality.broken and width", "width is a number, and `and` joins what is true or false"),
        ("style or quality.broken", "style is text, and `or` joins what is true or false"),
        ("not width", "width is a number, and `not` is for true or false"),
        ("style + 'a' == 'b'", "style is text, and arithmetic is for numbers"),
        ("-style == 1", "style is text, and arithmetic is for numbers"),
        ("quality.broken > false", "quality.broken is true or false, and neither has more or less"),
        ("width < null", "null is neither more nor less than anything; ask for it with == null or != null"),
        ("width is 3", "`is` asks for null; beside 3, write == or !="),
        ("'a' in style", "`in` takes a list, as in [1, 2]; style is none"),
        ("style in [text]", "a list of `in` holds numbers, texts, true, false and null; not text"),
        ("style in [*text]", "*text cannot be part of a condition (Starred)"),
        ("style in [text == 'a']", "a list of `in` holds"),
        ("width in [{[]}]", "the list {[]} can stand only after `in`"),
        ("width > 1) or (\ntrue", "its parentheses do not match"),
        ("width > 1\nand AND style", "--where cannot be read at character"),
        ("width >\n", "--where cannot be read at its end"),
        ("(width\n> 1", "--where cannot be read at its end: '(' was never closed"),
        ("# width > 1", "--where cannot be read at its end"),
        ("ﬁ > 1", 'ﬁ holds letters that Python replaces; write column["…"] around the name'),
        ("count == 9007199254740993", "count is rounded, and cannot be compared with a whole number as large as 90"),
        ("9007199254740993 < price", "price is rounded"),
        ("count in [1, 9007199254740993]", "count is rounded"),
        ("count == 18446744073709551615", "18446744073709551615 is not between -2**63 and 2**63 - 1"),
        ("[1, 2]", "the list [1, 2] can stand only after `in`"),
        ("len(style) > 1", "functions cannot be called: len(style)"),
        ("style.upper() == 'A'", "functions cannot be called: style.upper()"),
        ("__import__('os').system('x')", "functions cannot be called: __import__"),
        ("style.__class__ == 'a'", "style.__class__ is no column: only those of quality have a dot"),
        ("quality.broken.x", "quality.broken.x is no column"),
        ("tags[0] == 'a'", "tags[0] cannot be part of a condition (Subscript)"),
        ("column[0] == 'a'", "column[0] cannot be part of a condition (Subscript)"),
        ("width % 2 == 1", "the operator of width % 2 is not known here; there are +, -, * and /"),
        ("width ** 2 == 1", "the operator of width ** 2 is not known here"),
        ("(width > 1) & (style == 'a')", "is not known here; write and"),
        ("quality.broken | quality.broken", "is not known here; write or"),
        ("~quality.broken", "the operator of ~quality.broken is not known here; write not"),
        ("width if quality.broken else 3", "cannot be part of a condition (IfExp)"),
        ("lambda: 1", "lambda: 1 cannot be part of a condition (Lambda)"),
        ("(x := 3)", "cannot be part of a condition (NamedExpr)"),
        ("[x for x in style]", "cannot be part of a condition (ListComp)"),
        ("f'{style}' == 'a'", "cannot be part of a condition (JoinedStr)"),
        ("b'a' == style", "b'a' cannot be part of a condition (Constant)"),
        ("width > 2j", "2j cannot be part of a condition (Constant)"),
        ("width > 99999999999999999999", "99999999999999999999 is not between -2**63 and 2**63 - 1"),
    ],
)  # fmt: skip
def test_what_is_no_condition_on_these_columns_is_refused_in_one_line(condition, told):
    with pytest.raises(InputError) as error:
        parse_condition(condition, TABLE.schema)
    assert told in str(error.value)
    assert str(error.value).startswith("--where")
    assert "\n" not in str(error.value)


def test_long_parts_are_shortened_in_errors():
    with pytest.raises(InputError) as error:
        parse_condition(f"{'x' * 10_000} > 1", pa.schema([("width", pa.int32())]))
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("name", TABLE.column_names)
def test_columns_are_named_in_errors_as_one_writes_them(name):
    condition = parse_condition(f"{column_name(name)} != null", TABLE.schema)
    assert condition.columns == {name}


def test_a_condition_tells_which_columns_it_reads():
    condition = parse_condition("quality.broken or 1 < width < 3 or style in ['a']", TABLE.schema)
    assert condition.columns == {"quality_broken", "width", "style"}


def test_no_rows_are_no_trouble():
    rules = Rules(Filter(where="width > 1"), TABLE.schema)
    assert rules.judge(TABLE.select(list(rules.columns)).slice(0, 0)).tolist() == []
