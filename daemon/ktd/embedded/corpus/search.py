"""Answering from supplied search results, with citations that point to the right one."""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ktd.embedded.corpus.exchange import Exchange, Language, Split, is_held_out
from ktd.embedded.corpus.words import draw_word, word_key

# The form that plugin/ktd_pipe.py gives to sources (a test compares the two).
SEARCH_RESULT = "[webpage {n} begin]{body}[webpage {n} end]"
SEARCH_TEMPLATES: dict[Language, str] = {
    "en": (
        "# The following contents are the search results related to the user's message:\n"
        "{results}\n"
        "Each result is formatted as [webpage X begin]...[webpage X end], X is its number. Today is {date}. "
        "Not every result matters: choose. Cite with [citation:X] right after the sentence that uses result X, "
        "several as [citation:3][citation:5], not gathered at the end. Answer in the language of the question.\n"
        "\n"
        "# The user's message is:\n"
        "{question}"
    ),
    "zh": (
        "# 以下内容是基于用户发送的消息的搜索结果:\n"
        "{results}\n"
        "每个结果的格式是[webpage X begin]...[webpage X end]，X是它的编号。今天是{date}。"
        "并非所有结果都与问题有关，请筛选。用到结果X的句子之后紧跟[citation:X]，"
        "多个写成[citation:3][citation:5]，不要集中在最后。请用提问的语言回答。\n"
        "\n"
        "# 用户消息为：\n"
        "{question}"
    ),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """What can be known of a place: its name, the statement, the ways to ask for it, what kind of value it has."""

    topic: str
    statement: str
    questions: tuple[str, ...]
    clause: str
    value: str


_FACTS: dict[Language, tuple[Fact, ...]] = {
    "en": (
        Fact("year", "The {e} was built in {v}.", ("When was the {e} built?", "In which year was the {e} built?",
             "What year was the {e} built?"), "when was the {e} built", "year"),
        Fact("designer", "The {e} was designed by {v}.", ("Who designed the {e}?", "Who is the designer of the {e}?"),
             "who designed the {e}", "person"),
        Fact("height", "The {e} is {v} metres high.", ("How high is the {e}?", "How tall is the {e}?", "What is the height of the {e}?"),
             "how high is the {e}", "number"),
        Fact("place", "The {e} is in {v}.", ("Where is the {e}?", "In which town is the {e}?", "Where can I find the {e}?"),
             "where is the {e}", "town"),
        Fact("colour", "The {e} is painted {v}.", ("What colour is the {e}?", "Which color is the {e}?"),
             "what colour is the {e}", "colour"),
        Fact("price", "A ticket for the {e} costs {v} coins.", ("How much is a ticket for the {e}?", "What does a ticket for the {e} cost?",
             "How much does the {e} cost?"), "how much is a ticket for the {e}", "number"),
        Fact("opening", "The {e} opens at {v} o'clock.", ("When does the {e} open?", "At what time does the {e} open?"),
             "when does the {e} open", "hour"),
    ),
    "zh": (
        Fact("年份", "{e}建于{v}年。", ("{e}是哪一年建的？", "{e}建于哪一年？", "{e}什么时候建的？"), "{e}建于哪一年", "year"),
        Fact("设计者", "{e}由{v}设计。", ("谁设计了{e}？", "{e}是谁设计的？"), "{e}是谁设计的", "person"),
        Fact("高度", "{e}高{v}米。", ("{e}有多高？", "{e}的高度是多少？"), "{e}有多高", "number"),
        Fact("地点", "{e}位于{v}。", ("{e}在哪里？", "{e}位于哪里？"), "{e}在哪里", "town"),
        Fact("颜色", "{e}是{v}的。", ("{e}是什么颜色的？", "{e}是什么颜色？"), "{e}是什么颜色", "colour"),
        Fact("票价", "{e}的门票是{v}元。", ("{e}的门票多少钱？", "{e}门票是多少？", "参观{e}要多少钱？"), "{e}的门票多少钱", "number"),
        Fact("时间", "{e}{v}点开门。", ("{e}几点开门？", "{e}什么时候开门？"), "{e}几点开门", "hour"),
    ),
}  # fmt: skip
_KINDS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Bridge",
        "Tower",
        "Museum",
        "Library",
        "Garden",
        "Station",
        "Castle",
        "Theatre",
        "Market",
        "Temple",
    ),
    "zh": ("桥", "塔", "博物馆", "图书馆", "花园", "车站", "城堡", "剧院", "市场", "寺"),
}
_COLOURS: dict[Language, tuple[str, ...]] = {
    "en": ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "orange", "purple"),
    "zh": ("红色", "蓝色", "绿色", "黄色", "白色", "黑色", "棕色", "灰色", "橙色", "紫色"),
}
_FILLER: dict[Language, tuple[str, ...]] = {
    "en": ("Many people visit it every year.", "Visitors like the view.", "It is closed on Mondays.",
           "More pictures can be found below.", "Read more on the next page.", "It is well known in the region."),
    "zh": ("每年有很多人参观。", "游客喜欢这里的风景。", "星期一不开放。", "更多图片见下文。", "下一页有更多内容。", "在当地很有名。"),
}  # fmt: skip
_SYLLABLES = "安白北长成春大东方丰高光海和红华江金景兰临龙明南宁平青清秋山石双水松天文西新星雪阳永玉远云中竹"
_SURNAMES = "王李张刘陈杨赵黄周吴徐孙马朱胡林郭何高罗"
_NONE: dict[Language, tuple[str, str]] = {
    "en": ("It does not say.", "The search results do not say that."),
    "zh": ("没有说到。", "搜索结果里没有提到。"),
}


@dataclass(frozen=True, slots=True)
class Sought:
    """A fact that is asked for; `pages` are the places of all pages, `told` the topics of the right one in order.

    `page` counts from 1. `value` is None when the page does not tell.
    """

    pages: tuple[str, ...]
    page: int
    entity: str
    told: tuple[str, ...]
    fact: Fact
    value: str | None

    def sentence(self) -> str:
        """The statement as it stands on the page."""
        return self.fact.statement.format(e=self.entity, v=self.value)


def search_prompt(results: Sequence[tuple[str, str]], question: str, date: str, language: Language) -> str:
    """The user message for a question with sources; `results` are (title, text), `date` is ISO."""
    blocks = [
        SEARCH_RESULT.format(n=n, body=f"{title}\n{text}" if title else text)
        for n, (title, text) in enumerate(results, start=1)
    ]
    return SEARCH_TEMPLATES[language].format(results="\n".join(blocks), date=date, question=question)


def draw(rng: Random, language: Language, split: Split) -> Exchange:
    """One to five results about places; one or two facts asked for, now and then one that is not there."""
    results, question, sought, keys = draw_results(rng, language, split)
    thought, answer = respond(sought, language)
    date = f"20{rng.randint(20, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return Exchange(search_prompt(results, question, date, language), thought, answer, keys)


def draw_results(
    rng: Random, language: Language, split: Split
) -> tuple[list[tuple[str, str]], str, list[Sought], tuple[str, ...]]:
    """(results, question, what it asks for in order, keys of the places asked about)."""
    places = _places(rng, language, split, rng.randint(1, 5))
    titled = rng.random() < 0.75
    known: list[Sought] = []
    results = []
    for page, place in enumerate(places, start=1):
        facts = rng.sample(_FACTS[language], rng.randint(1, 3))
        told = tuple(fact.topic for fact in facts)
        found = [
            Sought(tuple(places), page, place, told, fact, _value(rng, fact, language, split))
            for fact in facts
        ]
        known += found
        sentences = [f.sentence() for f in found]
        if rng.random() < 0.5:
            sentences.insert(rng.randint(0, len(sentences)), rng.choice(_FILLER[language]))
        results.append((place if titled else "", (" " if language == "en" else "").join(sentences)))
    roll = rng.random()
    if roll < 0.3 and len(known) > 1:
        first, second = rng.sample(known, 2)
        question = _ask_both(first, second, language)
        return (
            results,
            question,
            [first, second],
            tuple({_place_key(first.entity), _place_key(second.entity)}),
        )
    only = rng.choice(known)
    if roll > 0.82:
        fact = rng.choice([fact for fact in _FACTS[language] if fact.topic not in only.told])
        only = Sought(only.pages, only.page, only.entity, only.told, fact, None)
    question = rng.choice(only.fact.questions).format(e=only.entity)
    return results, question, [only], (_place_key(only.entity),)


def respond(sought: Sequence[Sought], language: Language) -> tuple[str, str]:
    """(thought, answer) that uses what was found, each sentence cited.

    The thought lists which page is about what, then for each fact: what was asked, what its page tells, and what it
    says of that.
    """
    english = language == "en"
    comma, listing, stop = (", ", ", ", ".") if english else ("，", "、", "。")
    pages = comma.join(f"{place} {page}" for page, place in enumerate(sought[0].pages, start=1))
    lines, sentences = [pages + stop], []
    for one in sought:
        said = one.sentence() if one.value is not None else _NONE[language][0]
        asked, tells = ("Asked: ", "It tells: ") if english else ("问：", "说到：")
        lines += [
            f"{asked}{one.entity} {one.page}{comma}{one.fact.topic}{stop}",
            f"{tells}{listing.join(one.told)}{stop}",
            said,
        ]
        if one.value is None:
            sentences.append(_NONE[language][1])
        else:
            cited = f" [citation:{one.page}]." if english else f"[citation:{one.page}]。"
            sentences.append(said[:-1] + cited)
    return "\n".join(lines), (" " if english else "").join(sentences)


def _places(rng: Random, language: Language, split: Split, n: int) -> list[str]:
    """`n` different place names of the split."""
    places: dict[str, None] = {}
    while len(places) < n:
        kind = rng.choice(_KINDS[language])
        if language == "en":
            places[f"{draw_word(rng, split).capitalize()} {kind}"] = None
            continue
        name = "".join(rng.choices(_SYLLABLES, k=2)) + kind
        if is_held_out(_place_key(name)) is (split is Split.HELD_OUT):
            places[name] = None
    return list(places)


def _value(rng: Random, fact: Fact, language: Language, split: Split) -> str:
    if fact.value == "year":
        return str(rng.randint(1200, 2024))
    if fact.value == "number":
        return str(rng.randint(2, 400))
    if fact.value == "hour":
        return str(rng.randint(6, 12))
    if fact.value == "colour":
        return rng.choice(_COLOURS[language])
    if language == "zh":
        if fact.value == "person":
            return rng.choice(_SURNAMES) + "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 2)))
        return "".join(rng.choices(_SYLLABLES, k=2)) + rng.choice("市县镇")
    name = draw_word(rng, split).capitalize()
    return f"{draw_word(rng, split).capitalize()} {name}" if fact.value == "person" else name


def _ask_both(first: Sought, second: Sought, language: Language) -> str:
    clauses = [found.fact.clause.format(e=found.entity) for found in (first, second)]
    if language == "zh":
        return f"{clauses[0]}，{clauses[1]}？"
    return f"{clauses[0][0].upper()}{clauses[0][1:]}, and {clauses[1]}?"


def _place_key(place: str) -> str:
    """English places are made of a word of the split, Chinese ones are held out as a whole."""
    return word_key(place.split()[0]) if place.isascii() else f"place:{place}"
