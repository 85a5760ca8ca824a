"""Sorting by insertion: each line of the thought is the sorted list so far."""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ktd.embedded.corpus.exchange import Exchange, Language, Split, worded
from ktd.embedded.corpus.words import draw_word, word_key

_NUMBERS: dict[Language, dict[bool, tuple[str, ...]]] = {
    "en": {
        False: (
            "Sort these numbers: {x}", "Sort {x}", "Sort the numbers {x} from smallest to largest.",
            "Put {x} in ascending order.", "Order these numbers from small to large: {x}",
            "Please sort: {x}", "Sort in ascending order: {x}", "Arrange {x} from lowest to highest.",
        ),
        True: (
            "Sort {x} from largest to smallest.", "Sort these numbers in descending order: {x}",
            "Put {x} in descending order.", "Order from large to small: {x}", "Arrange {x} from highest to lowest.",
        ),
    },
    "zh": {
        False: (
            "把 {x} 从小到大排列。", "给这些数字排序：{x}", "请将{x}按升序排列", "从小到大排序：{x}", "排序：{x}",
            "请把这些数从小到大排好：{x}",
        ),
        True: (
            "把 {x} 从大到小排列。", "请将{x}按降序排列", "从大到小排序：{x}", "请把这些数从大到小排好：{x}",
        ),
    },
}  # fmt: skip
_WORDS: dict[Language, dict[bool, tuple[str, ...]]] = {
    "en": {
        False: (
            "Sort these words: {x}", "Sort these words alphabetically: {x}", "Put {x} in alphabetical order.",
            "Sort alphabetically: {x}", "Order the words {x} from a to z.", "Please sort the words {x}.",
            "Arrange in alphabetical order: {x}",
        ),
        True: (
            "Sort these words from z to a: {x}", "Sort in reverse alphabetical order: {x}",
            "Put {x} in reverse alphabetical order.", "Order the words {x} from z to a.",
        ),
    },
    "zh": {
        False: (
            "把这些单词按字母顺序排列：{x}", "按字母顺序排序：{x}", "请将单词{x}按字母顺序排好。", "给这些单词排序：{x}",
        ),
        True: (
            "把这些单词按字母倒序排列：{x}", "按字母倒序排序：{x}", "请将单词{x}从z到a排好。",
        ),
    },
}  # fmt: skip


def sort_numbers(numbers: Sequence[int], descending: bool, language: Language) -> tuple[str, str, str]:
    """(thought, answer, joined result)."""
    done: list[int] = []
    lines = [_order(descending, language)]
    for number in numbers:
        done = sorted([*done, number], reverse=descending)
        lines.append(f"{number}: {join(done, language)}")
    result = join(done, language)
    return "\n".join(lines), sentence(result, language), result


def sort_words(words: Sequence[str], descending: bool, language: Language) -> tuple[str, str, str]:
    """(thought, answer, joined result). Words are told apart by their first two letters, which must differ."""
    heads = {f"{w[0]} {w[1]}".lower(): w for w in words}
    if len(heads) != len(words):
        raise ValueError("Two of the words begin with the same two letters.")
    lines = [_order(descending, language)]
    lines += [f"{word}: {head}" for head, word in heads.items()]
    done: list[str] = []
    for head in heads:
        done = sorted([*done, head], reverse=descending)
        lines.append(join(done, language))
    result = join([heads[head] for head in done], language)
    return "\n".join(lines), sentence(result, language), result


def draw_numbers(rng: Random, language: Language) -> Exchange:
    """Three to six numbers below 1000, mostly below 100, seldom two alike."""
    top = 999 if rng.random() < 0.3 else 99
    numbers = rng.sample(range(top + 1), rng.randint(3, 6))
    if rng.random() < 0.06:
        numbers[-1] = numbers[0]
    descending = rng.random() < 0.35
    thought, answer, _ = sort_numbers(numbers, descending, language)
    question = worded(rng, language, _NUMBERS[language][descending], x=listed(rng, numbers, language))
    return Exchange(question, thought, answer, (numbers_key(numbers),))


def draw_words(rng: Random, language: Language, split: Split) -> Exchange:
    """Three to five words with different beginnings."""
    words = different_words(rng, split, rng.randint(3, 5))
    descending = rng.random() < 0.3
    thought, answer, _ = sort_words(words, descending, language)
    question = worded(rng, language, _WORDS[language][descending], x=listed(rng, words, language))
    return Exchange(question, thought, answer, tuple(map(word_key, words)))


def different_words(rng: Random, split: Split, n: int) -> list[str]:
    """`n` words whose first two letters differ."""
    words: dict[str, str] = {}
    while len(words) < n:
        word = draw_word(rng, split)
        words.setdefault(word[:2], word)
    return list(words.values())


def numbers_key(numbers: Sequence[int]) -> str:
    """The canonical key of a set of numbers: neither their order nor the direction makes a new problem."""
    return "sort:" + ",".join(map(str, sorted(numbers)))


def listed(rng: Random, items: Sequence[object], language: Language) -> str:
    """The items as a person would type them."""
    separators = (", ", ", ", " ", ",") if language == "en" else ("、", "，", ", ", " ", ",")
    return rng.choice(separators).join(map(str, items))


def join(items: Sequence[object], language: Language) -> str:
    """The items as the model lists them."""
    return (", " if language == "en" else "，").join(map(str, items))


def sentence(result: str, language: Language) -> str:
    """The answer that shows the joined `result`."""
    return f"Sorted: {result}." if language == "en" else f"排好了：{result}。"


def items_of(answer: str, language: Language) -> list[str]:
    """What `sentence` and `join` put together."""
    lead, separator = ("Sorted: ", ", ") if language == "en" else ("排好了：", "，")
    return answer.removeprefix(lead)[:-1].split(separator)


def _order(descending: bool, language: Language) -> str:
    if language == "zh":
        return "从大到小，逐个插入。" if descending else "从小到大，逐个插入。"
    return "Largest first, one by one." if descending else "Smallest first, one by one."
