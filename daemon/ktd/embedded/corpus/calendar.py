"""Days of the week and dates some days away."""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from random import Random

from ktd.embedded.corpus.arithmetic import keys_of
from ktd.embedded.corpus.exchange import Exchange, Language, worded

DAYS: dict[Language, tuple[str, ...]] = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_WEEKDAY: dict[Language, dict[bool, tuple[str, ...]]] = {
    "en": {
        True: (
            "What day is {n} days after {d}?", "Today is {d}. What day is it in {n} days?",
            "If today is {d}, what day of the week is it {n} days from now?", "Which weekday comes {n} days after {d}?",
            "It is {d}. What day will it be in {n} days?", "{n} days after {d}?", "What is {d} plus {n} days?",
        ),
        False: (
            "What day is {n} days before {d}?", "Today is {d}. What day was it {n} days ago?",
            "If today is {d}, what day of the week was it {n} days ago?", "Which weekday is {n} days before {d}?",
            "{n} days before {d}?",
        ),
    },
    "zh": {
        True: (
            "{d}之后{n}天是星期几？", "今天是{d}，{n}天后是星期几？", "如果今天是{d}，再过{n}天是星期几？",
            "{d}过{n}天是星期几？", "今天{d}，{n}天以后星期几？",
        ),
        False: (
            "{d}之前{n}天是星期几？", "今天是{d}，{n}天前是星期几？", "如果今天是{d}，{n}天以前是星期几？",
            "今天{d}，{n}天前星期几？",
        ),
    },
}  # fmt: skip
_DATE: dict[Language, dict[bool, tuple[str, ...]]] = {
    "en": {
        True: (
            "What date is {n} days after {m} {d}?", "Today is {m} {d}. What date is it in {n} days?",
            "What is the date {n} days after {m} {d}?", "{m} {d} plus {n} days?",
        ),
        False: (
            "What date is {n} days before {m} {d}?", "Today is {m} {d}. What date was it {n} days ago?",
            "What is the date {n} days before {m} {d}?",
        ),
    },
    "zh": {
        True: ("{m}{d}日之后{n}天是几月几日？", "今天是{m}{d}日，{n}天后是几号？", "{m}{d}日再过{n}天是几月几日？"),
        False: ("{m}{d}日之前{n}天是几月几日？", "今天是{m}{d}日，{n}天前是几号？"),
    },
}  # fmt: skip


def weekday(day: int, n: int, forward: bool, language: Language) -> tuple[str, str, int]:
    """(thought, answer, index of the day) for `n` days after or before `day` (0 = Monday)."""
    names = DAYS[language]
    english = language == "en"
    lines = []
    if n >= 7:
        rest = [str(left) for left in range(n, -1, -7)]
        chain = (", " if english else "，").join(rest)
        lines.append(f"Take away 7s: {chain}." if english else f"每次减 7：{chain}。")
    step = 1 if forward else -1
    walk = [f"{names[day]} 0"] + [f"{names[(day + step * i) % 7]} {i}" for i in range(1, n % 7 + 1)]
    joined = (", " if english else "，").join(walk)
    if english:
        lines.append(f"Step {'on' if forward else 'back'}: {joined}.")
    else:
        lines.append(f"往{'后' if forward else '前'}数：{joined}。")
    there = (day + step * n) % 7
    side = ("after" if forward else "before") if english else ("之后" if forward else "之前")
    unit = "day" if n == 1 else "days"
    if english:
        return "\n".join(lines), f"{n} {unit} {side} {names[day]} is {names[there]}.", there
    return "\n".join(lines), f"{names[day]}{side} {n} 天是{names[there]}。", there


def date(month: int, day: int, n: int, forward: bool, language: Language) -> tuple[str, str, tuple[str, ...]]:
    """(thought, answer, keys of the sums on the way); `month` counts from 0, 1 <= n <= 27, no leap year."""
    name = month_name(month, language)
    days = MONTH_DAYS[month]
    given: tuple[str, ...] = ()
    dot = "." if language == "en" else "。"
    lines: list[str] = []
    if forward:
        lines.append(_has(name, days, language))
        total = day + n
        given += keys_of("add", day, n)
        lines.append(f"{day} + {n} = {total}{dot}")
        if total > days:
            given += keys_of("sub", total, days)
            lines.append(f"{total} - {days} = {total - days}{dot}")
            month, total = (month + 1) % 12, total - days
    else:
        total = day - n
        if total >= 1:
            given += keys_of("sub", day, n)
            lines.append(f"{day} - {n} = {total}{dot}")
        else:
            month = (month - 1) % 12
            days = MONTH_DAYS[month]
            lines.append(_has(month_name(month, language), days, language))
            given += keys_of("add", day, days) + keys_of("sub", day + days, n)
            lines.append(f"{day} + {days} = {day + days}{dot}")
            total = day + days - n
            lines.append(f"{day + days} - {n} = {total}{dot}")
    return "\n".join(lines), _date_answer(month, total, language), given


def draw_weekday(rng: Random, language: Language) -> Exchange:
    """A weekday up to 60 days away."""
    return weekday_exchange(rng, language)[0]


def weekday_exchange(rng: Random, language: Language) -> tuple[Exchange, int]:
    """A question for a weekday, and the index of the day it leads to."""
    day, forward = rng.randrange(7), rng.random() < 0.65
    n = rng.randint(2, 60) if rng.random() < 0.6 else rng.randint(2, 20)
    thought, answer, there = weekday(day, n, forward, language)
    name = DAYS[language][day]
    if language == "zh" and rng.random() < 0.25:
        name = name.replace("星期", rng.choice(("周", "礼拜")))
    if name.endswith("日") and rng.random() < 0.4:
        name = name.removesuffix("日") + "天"
    question = worded(rng, language, _WEEKDAY[language][forward], d=name, n=n)
    return Exchange(question, thought, answer, (weekday_key(day, n, forward),)), there


def draw_date(rng: Random, language: Language) -> Exchange:
    """A date at most 27 days away, in a year without February 29."""
    month, forward = rng.randrange(12), rng.random() < 0.65
    day, n = rng.randint(1, MONTH_DAYS[month]), rng.randint(2, 27)
    thought, answer, given = date(month, day, n, forward, language)
    question = worded(rng, language, _DATE[language][forward], m=month_name(month, language), d=day, n=n)
    key = f"date:{month},{day},{n if forward else -n}"
    return Exchange(question, thought, answer, (key,), given)


def weekday_key(day: int, n: int, forward: bool) -> str:
    """The canonical key of a step through the week."""
    return f"weekday:{day},{n if forward else -n}"


def month_name(month: int, language: Language) -> str:
    """`month` counts from 0."""
    return MONTHS[month] if language == "en" else f"{month + 1}月"


def _has(name: str, days: int, language: Language) -> str:
    return f"{name} has {days} days." if language == "en" else f"{name}有 {days} 天。"


def _date_answer(month: int, day: int, language: Language) -> str:
    name = month_name(month, language)
    return f"That is {name} {day}." if language == "en" else f"是{name}{day}日。"
