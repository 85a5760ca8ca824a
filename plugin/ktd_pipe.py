"""
title: ktd
version: 0.1.0
license: Apache-2.0
description: DeepSeek-R1 and its kin with native thoughts, sources, progress and speeds, from a ktd daemon or any OpenAI-compatible service.
"""

from collections.abc import Sequence

# --- What the model sees when there are sources: DeepSeek's search form, kept short --------------------------------
# One block per source, numbered from 1 and joined by newlines; the body is "title\ntext", or the text alone.

SEARCH_RESULT = "[webpage {n} begin]{body}[webpage {n} end]"

SEARCH_TEMPLATES = {
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


def search_prompt(results: Sequence[tuple[str, str]], question: str, date: str, language: str) -> str:
    """The user message for a question with sources.

    `results` are (title, text), an empty title is left out; `date` is ISO (2025-01-31); `language` is "en" or "zh".
    """
    blocks = [
        SEARCH_RESULT.format(n=n, body=f"{title}\n{text}" if title else text)
        for n, (title, text) in enumerate(results, start=1)
    ]
    return SEARCH_TEMPLATES[language].format(results="\n".join(blocks), date=date, question=question)
