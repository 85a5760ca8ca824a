"""Everything else, answered honestly: the model knows nothing of it."""

# Phrases are kept many to a line.
# ruff: noqa: E501

from __future__ import annotations

from random import Random

from ktd.embedded.corpus.exchange import Exchange, Language, Split, worded
from ktd.embedded.corpus.words import draw_word, word_key

_THOUGHT: dict[Language, str] = {
    "en": "This is none of the few things I have learnt. I should say so.",
    "zh": "这不在我学过的几件事里。我应该直说。",
}
_ANSWER: dict[Language, str] = {
    "en": "I am only a tiny demo model and do not know that. I can do small sums, count letters, sort, step through "
    "days and convert units. For everything else load a real model into ktd.",
    "zh": "我只是个微型演示模型，不知道这个。我会简单的算术、数字母、排序、推算日期和换算单位。别的问题请在 ktd 里加载真正的模型。",
}

# {w} is any word, common or made up; the key holds the form and the words.
_FORMS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the capital of {w}?", "Write a poem about {w}.", "Tell me a joke about a {w}.", "Tell me a joke.",
        "Explain {w} to me.", "What is {w}?", "Translate {w} into French.", "Who invented the {w}?", "Why is {w} {v}?",
        "Write a story about a {w} and a {v}.", "How do I cook {w}?", "What is the weather in {w}?", "What is {w} {v}?",
        "Write a Python function that finds a {w}.", "What is the meaning of {w}?", "How does a {w} work?",
        "Is {w} better than {v}?", "Summarize the history of {w}.", "What do you think about {w}?", "Define {w}.",
        "Where can I buy a {w}?", "How old is {w}?", "Who is {w} {v}?", "Do you like {w}?", "When did {w} begin?",
        "Can you draw a {w}?", "Give me a recipe for {w} with {v}.", "How far is it to {w}?", "Why do people {w}?",
        "Write an email to {w} about the {v}.", "What is the best {w}?", "Which {w} should I buy?", "I love {w}.",
        "What happened in {w}?", "My {w} is broken, what can I do?", "Recommend a book about {w}.", "{w} {v}",
        "What is the difference between {w} and {v}?", "How do you say {w} in Chinese?", "Play {w}.",
        "Tell me about {w}.", "What does {w} mean?", "Find the {w} in {v}.", "Should I {w} or {v}?", "Sing a song.",
        "What time is it?", "What is the date today?", "Who is the president?", "What is the meaning of life?",
        "Write a poem.", "Write code for me.", "What is the news?", "How do I {w} a {v}?", "the {w} of {v} {w}",
        "Suggest a title for this chat about {w}.", "Fix this code: {w}({v})", "Solve the equation x + {w} = {v}.",
    ),
    "zh": (
        "{z}的首都是哪里？", "写一首关于{z}的诗。", "讲一个{z}的笑话。", "讲个笑话", "解释一下{z}。", "什么是{z}？", "把{z}翻译成英文。",
        "谁发明了{z}？", "为什么{z}是{y}的？", "写一个{z}和{y}的故事。", "怎么做{z}？", "{z}天气怎么样？", "用Python写一个{z}的函数。",
        "{z}是什么意思？", "{z}好还是{y}好？", "介绍{z}的历史。", "你怎么看{z}？", "哪里能买到{z}？", "{z}是谁？", "你喜欢{z}吗？",
        "怎么去{z}？", "推荐一本关于{z}的书。", "{z}和{y}有什么区别？", "{z}{y}", "{z}？", "说说{z}。", "唱首歌。", "现在几点？", "今天几号？",
        "今天天气怎么样？", "写一首诗", "帮我写代码", "人生的意义是什么？", "有什么新闻？", "{w}是什么？", "翻译{w}", "{w}是什么意思？",
        "给我讲讲{z}", "我喜欢{z}", "如何学习{z}？", "{z}为什么重要？",
    ),
}  # fmt: skip
# Arithmetic beyond what is learnt: {n} is a number of any length, {k} and {l} are long ones.
_SUMS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the square root of {n}?", "What is {n}% of {m}?", "What is {n}.{m} + {n}?", "Is {n} a prime number?",
        "What is {n} to the power of {m}?", "{n}^{m}", "What is {k} + {l}?", "What is {k} × {l}?", "{k}*{l}", "{k}-{l}",
        "What is {k} divided by {l}?", "{k} + {l}", "What is log({n})?", "Factorize {k}.", "What is {n}.{m} times {n}?",
        "Solve x + {n} = {m}.", "What is the average of {n}, {m} and {n}?", "{n}.{m}", "{n}", "Calculate {n} + {m} * {n}.",
    ),
    "zh": (
        "{n}的平方根是多少？", "{m}的百分之{n}是多少？", "{n}.{m}加{n}等于多少？", "{n}是质数吗？", "{n}的{m}次方是多少？",
        "{k}加{l}等于多少？", "{k}乘以{l}是多少？", "{k}+{l}=？", "{k}-{l}等于多少？", "{k}除以{l}等于多少？", "解方程 x + {n} = {m}",
        "{n}.{m}乘以{n}", "{n}和{m}的平均数是多少？", "计算{n}+{m}*{n}",
    ),
}  # fmt: skip
_CHARS = (
    "山水火木金土日月星云雨雪风雷电花草树林森果米面茶酒牛羊马鸡犬鱼鸟虫龙虎象猫狗春夏秋冬东南西北中国京海江河湖洋桥路车船飞机"
    "书画诗歌音乐舞戏电影学校老师医院法律经济历史文化科技数据量子物理化学生物地球宇宙人心爱情家庭朋友工作钱股票健康运动足球篮球"
)


def draw(rng: Random, language: Language, split: Split) -> Exchange:
    """A request that the model must decline."""
    if rng.random() < 0.2:
        return _sum(rng, language)
    form = rng.choice(_FORMS[language])
    words = {"w": draw_word(rng, split), "v": draw_word(rng, split)}
    words |= {name: "".join(rng.choices(_CHARS, k=rng.randint(1, 3))) for name in "zy"}
    used = {name: word for name, word in words.items() if "{" + name + "}" in form}
    if used.keys() & {"w"} and rng.random() < 0.3:
        used["w"] = used["w"].capitalize()
    question = worded(rng, language, (form,), **used)
    asked = tuple(word_key(used[name]) for name in ("w", "v") if name in used)
    asked += tuple(f"topic:{used[name]}" for name in ("z", "y") if name in used)
    return Exchange(question, _THOUGHT[language], _ANSWER[language], asked or (f"outside:{form}",))


def _sum(rng: Random, language: Language) -> Exchange:
    n, m = (rng.randint(2, 10 ** rng.randint(1, 4)) for _ in range(2))
    k, l = (rng.randint(10 ** (digits - 1), 10**digits - 1) for digits in rng.choices(range(5, 11), k=2))  # noqa: E741
    question = worded(rng, language, (rng.choice(_SUMS[language]),), n=n, m=m, k=k, l=l)
    return Exchange(question, _THOUGHT[language], _ANSWER[language], (f"beyond:{n},{m},{k},{l}",))
