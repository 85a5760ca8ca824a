"""Sums, differences, products and quotients, worked out digit by digit in the thought.

Only single-digit facts are spelt out on the way, so no thought gives away another problem's result.
"""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ktd.embedded.corpus.exchange import Exchange, Language, worded

SYMBOL = {"add": "+", "sub": "-", "mul": "×", "div": "÷"}

_FORMS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "add": (
            "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a}+{b}=", "{a} + {b} = ?",
            "Calculate {a} + {b}.", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "How much is {a} + {b}?",
            "What's {a}+{b}?", "Compute {a} plus {b}.", "I have {a} apples and get {b} more. How many do I have?",
            "Can you add {a} and {b}?", "{a} plus {b}?",
        ),
        "sub": (
            "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a}-{b}=", "{a} - {b} = ?",
            "Calculate {a} - {b}.", "Subtract {b} from {a}.", "What is the difference {a} - {b}?", "{a} minus {b}?",
            "How much is {a} - {b}?", "What's {a}-{b}?", "Take {b} away from {a}.", "Compute {a} minus {b}.",
        ),
        "mul": (
            "What is {a} × {b}?", "What is {a} times {b}?", "{a} × {b}", "{a}*{b}", "{a} * {b} =", "{a} x {b} = ?",
            "Calculate {a} * {b}.", "Multiply {a} by {b}.", "What is the product of {a} and {b}?", "{a} times {b}?",
            "How much is {a} × {b}?", "What's {a}*{b}?", "Compute {a} times {b}.", "{a}×{b}=",
        ),
        "div": (
            "What is {a} ÷ {b}?", "What is {a} divided by {b}?", "{a} ÷ {b}", "{a}/{b}", "{a} / {b} =", "{a}÷{b}=",
            "Calculate {a} / {b}.", "Divide {a} by {b}.", "How much is {a} ÷ {b}?", "What's {a}/{b}?",
            "Compute {a} divided by {b}.", "How many times does {b} go into {a}?",
        ),
    },
    "zh": {
        "add": (
            "{a} + {b} 等于多少？", "{a}加{b}等于多少？", "{a}+{b}等于几？", "{a}+{b}=？", "请计算 {a} + {b}。",
            "计算{a}+{b}", "{a} 加上 {b} 是多少？", "{a}和{b}的和是多少？", "算一下{a}加{b}",
            "我有{a}个苹果，又买了{b}个，一共几个？",
        ),
        "sub": (
            "{a} - {b} 等于多少？", "{a}减{b}等于多少？", "{a}-{b}等于几？", "{a}-{b}=？", "请计算 {a} - {b}。",
            "计算{a}-{b}", "{a} 减去 {b} 是多少？", "{a}与{b}的差是多少？", "算一下{a}减{b}",
        ),
        "mul": (
            "{a} × {b} 等于多少？", "{a}乘{b}等于多少？", "{a}×{b}等于几？", "{a}*{b}=？", "请计算 {a} × {b}。",
            "计算{a}*{b}", "{a} 乘以 {b} 是多少？", "{a}和{b}的积是多少？", "算一下{a}乘以{b}",
        ),
        "div": (
            "{a} ÷ {b} 等于多少？", "{a}除以{b}等于多少？", "{a}÷{b}等于几？", "{a}/{b}=？", "请计算 {a} ÷ {b}。",
            "计算{a}/{b}", "{a} 除以 {b} 是多少？", "算一下{a}除以{b}",
        ),
    },
}  # fmt: skip

_SAY: dict[Language, dict[str, str]] = {
    "en": {
        "add": "Add from the right.",
        "sub": "Subtract from the right.",
        "swap": "{a} is less than {b}: subtract the other way round and put a minus.",
        "times": "Times {d}, from the right.",
        "div": "Divide from the left.",
        "write": "{sum}, write {digit}.",
        "carry": "{sum}, write {digit}, carry {carry}.",
        "borrow": "{sum}, write {digit}, borrow 1.",
        "front": "Write the {carry} in front.",
        "read": "Upwards: {raw}.",
        "strip": "Upwards: {raw}, that is {value}.",
        "shift": "One 0 behind: {value}.",
        "down": "{sum}, rest {rest}.",
        "quotient": "Downwards: {raw}.",
        "quotient_strip": "Downwards: {raw}, that is {value}.",
        "rest": "{a} ÷ {b} = {q} remainder {r}.",
        "equals": "{a} {op} {b} = {c}.",
    },
    "zh": {
        "add": "从右往左加。",
        "sub": "从右往左减。",
        "swap": "{a} 小于 {b}：倒过来减，再加负号。",
        "times": "乘以 {d}，从右往左。",
        "div": "从左往右除。",
        "write": "{sum}，写 {digit}。",
        "carry": "{sum}，写 {digit}，进 {carry}。",
        "borrow": "{sum}，写 {digit}，借 1。",
        "front": "前面写 {carry}。",
        "read": "从下往上：{raw}。",
        "strip": "从下往上：{raw}，就是 {value}。",
        "shift": "后面加一个 0：{value}。",
        "down": "{sum}，余 {rest}。",
        "quotient": "从上往下：{raw}。",
        "quotient_strip": "从上往下：{raw}，就是 {value}。",
        "rest": "{a} ÷ {b} = {q} 余 {r}。",
        "equals": "{a} {op} {b} = {c}。",
    },
}


@dataclass(frozen=True, slots=True)
class Worked:
    """A problem solved: the lines of the thought, the result, and the sentence that answers."""

    lines: tuple[str, ...]
    result: int
    answer: str


def key_of(op: str, a: int, b: int) -> str | None:
    """The canonical key, or None for a fact of the tables (every training needs those).

    The tables hold what one-digit numbers make, there and back, and what is left of up to 58 days when a month is
    over.
    """
    if op in ("add", "mul"):
        return None if max(a, b) < 10 else f"{op}:{min(a, b)},{max(a, b)}"
    if op == "sub":
        if b in (28, 30, 31) and b < a <= 58:
            return None
        return None if max(a, b) < 20 and min(a, b) < 10 else f"sub:{max(a, b)},{min(a, b)}"
    return None if a < 10 * b else f"div:{a},{b}"


def keys_of(op: str, a: int, b: int) -> tuple[str, ...]:
    """`key_of` as a tuple, empty for a fact of the tables."""
    key = key_of(op, a, b)
    return () if key is None else (key,)


def add_lines(a: int, b: int, language: Language) -> list[str]:
    """Column addition; the last line reads off the sum."""
    say = _SAY[language]
    x, y = str(a)[::-1], str(b)[::-1]
    lines, digits, carry = [say["add"]], "", 0
    for i in range(max(len(x), len(y))):
        terms = [digit[i] if i < len(digit) else "0" for digit in (x, y)]
        total = int(terms[0]) + int(terms[1]) + carry
        text = " + ".join([*terms, *([str(carry)] if carry else [])]) + f" = {total}"
        digits, carry = str(total % 10) + digits, total // 10
        lines.append(say["carry" if carry else "write"].format(sum=text, digit=digits[0], carry=carry))
    if carry:
        digits = str(carry) + digits
        lines.append(say["front"].format(carry=carry))
    return [*lines, _read(digits, language)]


def sub_lines(a: int, b: int, language: Language) -> list[str]:
    """Column subtraction of b from a, a >= b; the last line reads off the difference."""
    say = _SAY[language]
    x, y = str(a)[::-1], str(b)[::-1]
    lines, digits, borrow = [say["sub"]], "", 0
    for i in range(len(x)):
        top, bottom = int(x[i]), int(y[i]) if i < len(y) else 0
        lacks = top - bottom - borrow < 0
        if lacks:
            top += 10
        left = top - bottom - borrow
        text = f"{top} - {bottom}" + (" - 1" if borrow else "") + f" = {left}"
        digits, borrow = str(left) + digits, int(lacks)
        lines.append(say["borrow" if lacks else "write"].format(sum=text, digit=left))
    return [*lines, _read(digits, language)]


def mul_lines(a: int, b: int, language: Language) -> list[str]:
    """Long multiplication by b, or by a if that has fewer digits; the last line reads off the product.

    The multiplier has at most two digits.
    """
    say = _SAY[language]
    if len(str(a)) < len(str(b)):
        a, b = b, a
    lines: list[str] = []
    partials: list[int] = []
    for place, digit in enumerate(reversed(str(b))):
        lines.append(say["times"].format(d=digit))
        digits, carry = "", 0
        for top in reversed(str(a)):
            total = int(top) * int(digit) + carry
            text = f"{digit} × {top}" + (f" + {carry}" if carry else "") + f" = {total}"
            digits, carry = str(total % 10) + digits, total // 10
            lines.append(say["carry" if carry else "write"].format(sum=text, digit=digits[0], carry=carry))
        if carry:
            digits = str(carry) + digits
            lines.append(say["front"].format(carry=carry))
        lines.append(_read(digits, language))
        partials.append(int(digits) * 10**place)
        if place:
            lines.append(say["shift"].format(value=partials[-1]))
    if len(partials) == 2:
        lines += add_lines(partials[0], partials[1], language)
    return lines


def div_lines(a: int, b: int, language: Language) -> list[str]:
    """Long division by one digit; the last line reads off the quotient, the one before ends with the rest."""
    say = _SAY[language]
    lines, digits, rest = [say["div"]], "", 0
    for digit in str(a):
        part = rest * 10 + int(digit)
        digits, rest = digits + str(part // b), part % b
        lines.append(say["down"].format(sum=f"{part} ÷ {b} = {digits[-1]}", rest=rest))
    form = "quotient" if digits == str(int(digits)) else "quotient_strip"
    return [*lines, say[form].format(raw=digits, value=int(digits))]


def solve(op: str, a: int, b: int, language: Language) -> Worked:
    """Works out `a op b`; div is by one digit, mul by at most two."""
    say = _SAY[language]
    lines = [f"{a} {SYMBOL[op]} {b}" + ("." if language == "en" else "。")]
    if op == "add":
        result = a + b
        lines += add_lines(a, b, language)
    elif op == "sub":
        result = a - b
        if a < b:
            lines.append(say["swap"].format(a=a, b=b))
        lines += sub_lines(max(a, b), min(a, b), language)
    elif op == "mul":
        result = a * b
        lines += mul_lines(a, b, language)
    else:
        result, rest = divmod(a, b)
        lines += div_lines(a, b, language)
        if rest:
            return Worked(tuple(lines), result, say["rest"].format(a=a, b=b, q=result, r=rest))
    return Worked(tuple(lines), result, say["equals"].format(a=a, op=SYMBOL[op], b=b, c=result))


def operands(rng: Random, op: str) -> tuple[int, int]:
    """Two numbers of a size the model is meant to master."""
    if op in ("add", "sub"):
        a, b = _number(rng), _number(rng)
        return (a, b) if op == "add" or a >= b or rng.random() < 0.3 else (b, a)
    if op == "mul":
        low, high = rng.choices(((0, 9), (10, 99), (100, 999)), (10, 75, 15))[0]
        a = rng.randint(low, high)
        b = rng.randint(10, 99) if a < 100 and rng.random() < 0.55 else rng.randint(0, 9)
        return (a, b) if rng.random() < 0.5 else (b, a)
    b = rng.randint(2, 9)
    a = rng.randint(1, 99) if rng.random() < 0.4 else rng.randint(100, 999)
    return (a - a % b if a > b and rng.random() < 0.5 else a), b


def draw(rng: Random, language: Language, op: str) -> Exchange:
    """One problem of the kind `op`: add, sub, mul or div."""
    a, b = operands(rng, op)
    return exchange(rng, language, op, a, b)


def exchange(rng: Random, language: Language, op: str, a: int, b: int) -> Exchange:
    """The problem `a op b` in some wording."""
    worked = solve(op, a, b, language)
    question = worded(rng, language, _FORMS[language][op], a=a, b=b)
    return Exchange(question, "\n".join(worked.lines), worked.answer, keys_of(op, a, b))


def _number(rng: Random) -> int:
    digits = rng.choices((1, 2, 3, 4), (13, 37, 38, 12))[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _read(digits: str, language: Language) -> str:
    form = "read" if digits == str(int(digits)) else "strip"
    return _SAY[language][form].format(raw=digits, value=int(digits))
