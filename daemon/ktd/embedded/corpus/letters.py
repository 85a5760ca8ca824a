"""Counting letters: the thought spells the word and numbers the hits."""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from random import Random

from ktd.embedded.corpus.exchange import Exchange, Language, Split, worded
from ktd.embedded.corpus.words import draw_word, word_key

_ONE: dict[Language, tuple[str, ...]] = {
    "en": (
        "How many {c} are in {w}?", "How many {c}'s are in {w}?", "How many {c} in {w}?", 'How many "{c}" in "{w}"?',
        'How many times does the letter {c} appear in "{w}"?', "Count the letter {c} in {w}.", "How many {c}s in {w}?",
        'Count the {c} in the word "{w}".', "How many letters {c} are there in the word {w}?",
        "how many {c}'s in the word {w}", 'How often does "{c}" occur in {w}?', "How many {c}'s does {w} have?",
        "How many {c}s are in the word {w}?", "How many {c}'s are there in {w}?", "How many {c}s does {w} contain?",
    ),
    "zh": (
        "{w} 里有几个 {c}？", "{w}里有几个{c}？", "单词 {w} 中有多少个字母 {c}？", "“{w}”里有几个“{c}”？",
        "数一数 {w} 里的 {c}。", "{w}这个单词里有几个字母{c}？", "字母 {c} 在 {w} 中出现了几次？",
        "“{w}”这个词中有多少个“{c}”？", "在单词{w}中，字母{c}出现几次？", "请数一下{w}里有多少个{c}",
    ),
}  # fmt: skip
_ALL: dict[Language, tuple[str, ...]] = {
    "en": (
        "How many letters are in {w}?", 'How many letters does "{w}" have?', "Count the letters of {w}.",
        "How long is the word {w}?", "How many letters are there in the word {w}?", "How many letters in {w}?",
    ),
    "zh": (
        "{w} 有几个字母？", "单词 {w} 一共有多少个字母？", "“{w}”有多少个字母？", "数一数{w}有几个字母。",
        "{w}这个单词有多长？",
    ),
}  # fmt: skip


def count(word: str, letter: str, language: Language) -> tuple[str, str]:
    """(thought, answer) for "how many `letter` in `word`"; case does not matter."""
    hits = 0
    spelt = []
    for c in word.lower():
        if c == letter:
            hits += 1
            spelt.append(f"{c}{hits}")
        else:
            spelt.append(c)
    if language == "zh":
        return (
            f"数 {letter}：{' '.join(spelt)}。一共 {hits} 个。",
            f"{word} 里有 {hits} 个 {letter}。",
        )
    amount = {0: "is no", 1: "is 1"}.get(hits, f"are {hits}")
    return f"Count {letter}: {' '.join(spelt)}. That is {hits}.", f'There {amount} "{letter}" in {word}.'


def length(word: str, language: Language) -> tuple[str, str]:
    """(thought, answer) for "how many letters has `word`"."""
    spelt = [f"{c}{i}" for i, c in enumerate(word.lower(), start=1)]
    if language == "zh":
        return f"数全部字母：{' '.join(spelt)}。一共 {len(word)} 个。", f"{word} 有 {len(word)} 个字母。"
    return f"Count all: {' '.join(spelt)}. That is {len(word)}.", f"{word} has {len(word)} letters."


def some_letter(rng: Random, word: str) -> str:
    """A letter worth asking for: mostly one that the word has."""
    return rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")


def draw(rng: Random, language: Language, split: Split) -> Exchange:
    """A question about the letters of one word."""
    word = draw_word(rng, split)
    shown = word.capitalize() if rng.random() < 0.12 else word
    if rng.random() < 0.2:
        thought, answer = length(shown, language)
        question = worded(rng, language, _ALL[language], w=shown)
        return Exchange(question, thought, answer, (word_key(word),))
    return ask(rng, language, shown, some_letter(rng, word))


def ask(rng: Random, language: Language, word: str, letter: str) -> Exchange:
    """How many `letter` are in `word`, in some wording."""
    thought, answer = count(word, letter, language)
    asked = letter.upper() if rng.random() < 0.08 else letter
    question = worded(rng, language, _ONE[language], w=word, c=asked)
    return Exchange(question, thought, answer, (word_key(word),))
