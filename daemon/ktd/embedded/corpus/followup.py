"""Second turns that make sense only after the first."""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from random import Random

from ktd.embedded.corpus import arithmetic, calendar, letters, sorting, units
from ktd.embedded.corpus.exchange import Exchange, Language, Split, worded
from ktd.embedded.corpus.words import draw_word, word_key

_THEN: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "add": ("And plus {b}?", "Now add {b}.", "Plus {b}?", "Add {b} to that.", "And if I add {b}?", "+ {b}"),
        "sub": ("And minus {b}?", "Now subtract {b}.", "Minus {b}?", "Take away {b} from that.", "- {b}"),
        "mul": ("And times {b}?", "Now multiply it by {b}.", "Times {b}?", "Multiply that by {b}.", "× {b}"),
        "div": ("And divided by {b}?", "Now divide it by {b}.", "Divide that by {b}.", "÷ {b}"),
        "letter": ("And how many {c}?", "And {c}?", "What about {c}?", "How many {c}'s?", "Now count the {c}."),
        "word": ("And in {w}?", "What about {w}?", "And how many in {w}?", "Now the same for {w}."),
        "back": ("Now sort them backwards.", "Now the other way round.", "Reverse the order.", "And in reverse order?",
                 "Now backwards.", "Reverse it."),
        "later": ("And {n} days later?", "And {n} days after that?", "Then {n} more days?"),
        "amount": ("And {n} {b}?", "What about {n} {b}?", "And for {n} {b}?"),
    },
    "zh": {
        "add": ("再加{b}呢？", "再加上 {b}？", "结果再加{b}是多少？", "那加{b}呢？"),
        "sub": ("再减{b}呢？", "再减去 {b}？", "结果再减{b}是多少？", "那减{b}呢？"),
        "mul": ("再乘{b}呢？", "再乘以 {b}？", "结果再乘以{b}是多少？", "那乘{b}呢？"),
        "div": ("再除以{b}呢？", "再除以 {b}？", "结果再除以{b}是多少？"),
        "letter": ("那{c}呢？", "{c}有几个？", "还有几个{c}？", "那么 {c} 呢？"),
        "word": ("那{w}呢？", "{w}里呢？", "换成 {w} 呢？"),
        "back": ("现在倒过来排。", "反过来呢？", "倒序排列。", "再倒过来"),
        "later": ("再过{n}天呢？", "再往后{n}天呢？", "之后{n}天呢？"),
        "amount": ("那{n}{b}呢？", "{n}{b}呢？", "换成{n}{b}呢？"),
    },
}  # fmt: skip

Turns = tuple[Exchange, Exchange]


def draw(rng: Random, language: Language, split: Split) -> Turns:
    """(first turn, second turn); the second's keys cover what it newly asks, the first's are given."""
    kind = rng.choice((_calculation, _calculation, _calculation, _letters, _sorting, _weekday, _units))
    first, second = kind(rng, language, split)
    given = second.given + tuple(key for key in first.asked + first.given if key not in second.asked)
    return first, Exchange(second.question, second.thought, second.answer, second.asked, given)


def _calculation(rng: Random, language: Language, split: Split) -> Turns:
    while True:
        op = rng.choice(("add", "sub", "mul"))
        a, b = arithmetic.operands(rng, op)
        first = arithmetic.exchange(rng, language, op, a, b)
        result = arithmetic.solve(op, a, b, language).result
        then = rng.choice(("add", "sub", "mul", "div"))
        _, c = arithmetic.operands(rng, then)
        fits = {"add": c > 0, "sub": 0 < c <= result, "mul": 0 < c < 10, "div": result >= 2}[then]
        if not fits or not 0 <= result <= 999 or (then == "mul" and result > 99):
            continue
        worked = arithmetic.solve(then, result, c, language)
        question = worded(rng, language, _THEN[language][then], b=c)
        keys = arithmetic.keys_of(then, result, c)
        return first, Exchange(question, "\n".join(worked.lines), worked.answer, keys)


def _letters(rng: Random, language: Language, split: Split) -> Turns:
    word = draw_word(rng, split)
    letter = letters.some_letter(rng, word)
    first = letters.ask(rng, language, word, letter)
    if rng.random() < 0.5:
        other = letters.some_letter(rng, word)
        thought, answer = letters.count(word, other, language)
        question = worded(rng, language, _THEN[language]["letter"], c=other)
        return first, Exchange(question, thought, answer, (word_key(word),))
    other = draw_word(rng, split)
    thought, answer = letters.count(other, letter, language)
    question = worded(rng, language, _THEN[language]["word"], w=other)
    return first, Exchange(question, thought, answer, (word_key(other),))


def _sorting(rng: Random, language: Language, split: Split) -> Turns:
    first = (
        sorting.draw_numbers(rng, language)
        if rng.random() < 0.5
        else sorting.draw_words(rng, language, split)
    )
    items = sorting.items_of(first.answer, language)
    thought = "The other way round." if language == "en" else "倒过来。"
    answer = sorting.sentence(sorting.join(items[::-1], language), language)
    return first, Exchange(worded(rng, language, _THEN[language]["back"]), thought, answer, first.asked)


def _weekday(rng: Random, language: Language, split: Split) -> Turns:
    first, there = calendar.weekday_exchange(rng, language)
    n = rng.randint(2, 20)
    thought, answer, _ = calendar.weekday(there, n, True, language)
    question = worded(rng, language, _THEN[language]["later"], n=n)
    return first, Exchange(question, thought, answer, (calendar.weekday_key(there, n, True),))


def _units(rng: Random, language: Language, split: Split) -> Turns:
    unit, n = units.draw_unit(rng)
    other = rng.randint(2, 40)
    first = units.exchange_down(rng, language, unit, n)
    thought, answer = units.convert_down(unit, other, language)
    question = worded(
        rng, language, _THEN[language]["amount"], n=other, b=unit.big[0 if language == "en" else 1]
    )
    return first, Exchange(
        question, thought, answer, (units.unit_key(unit, other),), units.product_keys(unit, other)
    )
