"""Conversions between units, both ways."""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ktd.embedded.corpus.arithmetic import div_lines, keys_of, mul_lines
from ktd.embedded.corpus.exchange import Exchange, Language, worded


@dataclass(frozen=True, slots=True)
class Unit:
    """One `big` is `head` followed by `zeros` zeros of `small`; names are (English plural, Chinese)."""

    big: tuple[str, str]
    small: tuple[str, str]
    head: int
    zeros: int


UNITS = (
    Unit(("hours", "小时"), ("minutes", "分钟"), 6, 1),
    Unit(("minutes", "分钟"), ("seconds", "秒"), 6, 1),
    Unit(("days", "天"), ("hours", "小时"), 24, 0),
    Unit(("weeks", "周"), ("days", "天"), 7, 0),
    Unit(("years", "年"), ("months", "个月"), 12, 0),
    Unit(("metres", "米"), ("centimetres", "厘米"), 1, 2),
    Unit(("kilometres", "公里"), ("metres", "米"), 1, 3),
    Unit(("centimetres", "厘米"), ("millimetres", "毫米"), 1, 1),
    Unit(("kilograms", "公斤"), ("grams", "克"), 1, 3),
    Unit(("litres", "升"), ("millilitres", "毫升"), 1, 3),
    Unit(("tonnes", "吨"), ("kilograms", "公斤"), 1, 3),
)

_DOWN: dict[Language, tuple[str, ...]] = {
    "en": (
        "How many {s} are {n} {b}?", "How many {s} are in {n} {b}?", "Convert {n} {b} to {s}.", "{n} {b} in {s}?",
        "What is {n} {b} in {s}?", "{n} {b} is how many {s}?",
    ),
    "zh": ("{n}{b}是多少{s}？", "{n} {b}等于多少{s}？", "把{n}{b}换算成{s}。", "{n}{b}有多少{s}？", "{n}{b}等于几{s}？"),
}  # fmt: skip


def convert_down(unit: Unit, n: int, language: Language) -> tuple[str, str]:
    """(thought, answer) for `n` big units in small ones."""
    lines = [_definition(unit, language)]
    value = n
    if unit.head > 1:
        lines += mul_lines(n, unit.head, language)
        value = n * unit.head
    if unit.zeros:
        value *= 10**unit.zeros
        lines.append(_zeros(unit.zeros, value, True, language))
    return "\n".join(lines), _answer(n, unit.big, value, unit.small, language)


def convert_up(unit: Unit, n: int, language: Language) -> tuple[str, str]:
    """(thought, answer) for the small units that make `n` big ones; `unit.head` has one digit."""
    lines = [_definition(unit, language)]
    value = n * unit.head
    if unit.zeros:
        lines.append(_zeros(unit.zeros, value, False, language))
    if unit.head > 1:
        lines += div_lines(value, unit.head, language)
    return "\n".join(lines), _answer(value * 10**unit.zeros, unit.small, n, unit.big, language)


def draw_unit(rng: Random) -> tuple[Unit, int]:
    """A unit and an amount of it."""
    unit = rng.choice(UNITS)
    return unit, rng.randint(2, 99 if unit.head < 10 else 40)


def draw(rng: Random, language: Language) -> Exchange:
    """A conversion of 2 to 99 big units, or of what is as many in small ones."""
    unit, n = draw_unit(rng)
    which = 0 if language == "en" else 1
    if unit.head < 10 and rng.random() < 0.4:
        thought, answer = convert_up(unit, n, language)
        n_small = n * unit.head * 10**unit.zeros
        question = worded(rng, language, _DOWN[language], n=n_small, b=unit.small[which], s=unit.big[which])
        return Exchange(question, thought, answer, (unit_key(unit, n),), product_keys(unit, n))
    return exchange_down(rng, language, unit, n)


def exchange_down(rng: Random, language: Language, unit: Unit, n: int) -> Exchange:
    """`n` big units in small ones, in some wording."""
    which = 0 if language == "en" else 1
    thought, answer = convert_down(unit, n, language)
    question = worded(rng, language, _DOWN[language], n=n, b=unit.big[which], s=unit.small[which])
    return Exchange(question, thought, answer, (unit_key(unit, n),), product_keys(unit, n))


def unit_key(unit: Unit, n: int) -> str:
    """The canonical key: there and back is one problem."""
    return f"unit:{unit.big[0]}>{unit.small[0]},{n}"


def product_keys(unit: Unit, n: int) -> tuple[str, ...]:
    """Keys of the arithmetic that the conversion shows."""
    if unit.head == 1:
        return ()
    return keys_of("mul", n, unit.head) + keys_of("div", n * unit.head, unit.head)


def _definition(unit: Unit, language: Language) -> str:
    size = unit.head * 10**unit.zeros
    if language == "zh":
        return f"1 {unit.big[1]} = {size} {unit.small[1]}。"
    return f"1 {unit.big[0].removesuffix('s')} = {size} {unit.small[0]}."


def _zeros(zeros: int, value: int, add: bool, language: Language) -> str:
    if language == "zh":
        return f"{'加上' if add else '去掉'} {zeros} 个 0：{value}。"
    return f"{'Put' if add else 'Take away'} {zeros} zeros: {value}."


def _answer(n: int, source: tuple[str, str], value: int, target: tuple[str, str], language: Language) -> str:
    if language == "zh":
        return f"{n} {source[1]} = {value} {target[1]}。"
    return f"{n} {_plural(n, source[0])} = {value} {_plural(value, target[0])}."


def _plural(n: int, name: str) -> str:
    return name.removesuffix("s") if n == 1 else name
