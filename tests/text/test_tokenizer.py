"""Text becomes the tokens that Hugging Face's tokenizer gives, and never a special one."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kit
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from kit_text import KIMI_TAGS, ModelOf

from ktd.errors import GgufError, RequestError
from ktd.gguf import GgufFile
from ktd.text import TextModel
from ktd.text.pretokenizer import pre_tokenizer

# As they stand in the models' own files (DeepSeek-V3 tokenizer.json; Kimi-K2 tokenization_kimi.py).
HF_SPLITS = {
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    "kimi-k2": [
        r"[\p{Han}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
TEXTS = [
    "Hello, world! How many letters are there?",
    "  leading and trailing  \n\n  ",
    "你好,世界!今天的天气怎么样?1234567",
    "こんにちは、世界。안녕하세요 세계",
    "def f(x):\n    return x[1:]  # über, naïve, é́\r\n\r\n\tend",
    "It's I'M we'LL HTMLParser3000 ①②③ ½ 𝟙𝟚 😀👍🏽 \u200d \ufeff",
    "the lazy dog" * 50,
    "",
]
text_ = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    "aA1 \n'你é!<|>｜", max_size=60
)


def reference(metadata: dict[str, object], *, added: bool = False) -> tokenizers.Tokenizer:
    """tokenizer.json of the same vocabulary as Hugging Face writes it."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    types: list[int] = metadata["tokenizer.ggml.token_type"]  # type: ignore[assignment]
    merges: list[str] = metadata["tokenizer.ggml.merges"]  # type: ignore[assignment]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    splits = HF_SPLITS[str(metadata["tokenizer.ggml.pre"])]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": kind == 3, **flags}
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind != 1 and added
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
                for regex in splits
            ]
            + [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    return tokenizers.Tokenizer.from_str(json.dumps(document))


@pytest.fixture(scope="module", params=["deepseek-v3", "kimi-k2"])
def pair(request: pytest.FixtureRequest, model_of: ModelOf) -> tuple[TextModel, tokenizers.Tokenizer]:
    return model_of("deepseek-r1", pre=request.param), reference(kit.tiny_vocab(None, request.param))


def test_tokens_are_hugging_faces(pair: tuple[TextModel, tokenizers.Tokenizer]) -> None:
    model, oracle = pair
    for text in TEXTS:
        assert model.encode(text) == oracle.encode(text, add_special_tokens=False).ids, text


@settings(max_examples=300, deadline=None)
@given(text=text_)
def test_tokens_are_hugging_faces_for_any_text(
    pair: tuple[TextModel, tokenizers.Tokenizer], text: str
) -> None:
    model, oracle = pair
    ids = model.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    detokenizer = model.detokenizer()
    assert detokenizer.push(ids) + detokenizer.flush() == text


def pieces(name: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in pre_tokenizer(name).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("deepseek-v3", "in 2024 it's 12345", ["in", " ", "202", "4", " it", "'s", " ", "123", "45"]),
        ("deepseek-v3", "ab你好かな.ok  \n x", ["ab", "你好かな", ".ok", "  \n", " x"]),
        (
            "deepseek-llm",
            "It's 2024!\n好 x",
            ["It", "'", "s", " ", "2", "0", "2", "4", "!", "\n", "好", " x"],
        ),
        # Its punctuation class runs from : to ~ and so takes ASCII letters away from others.
        (
            "deepseek-llm",
            "Größe, été。한국 a  ",
            ["Gr", "öß", "e", ",", " é", "t", "é", "。", "한국", " a", "  "],
        ),
        ("deepseek-llm", "Привет, мир", ["Привет", ",", " мир"]),
        ("kimi-k2", "It's 12345你好かな", ["It's", " ", "123", "45", "你好", "かな"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(name: str, text: str, expected: list[str]) -> None:
    assert pieces(name, text) == expected


def specials() -> list[str]:
    deepseek: list[str] = kit.tiny_vocab()["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    types: list[int] = kit.tiny_vocab()["tokenizer.ggml.token_type"]  # type: ignore[assignment]
    return [token for token, kind in zip(deepseek, types, strict=True) if kind != 1]


@pytest.mark.parametrize("special", specials())
def test_no_special_token_comes_from_text(model_of: ModelOf, special: str) -> None:
    model = model_of("deepseek-r1")
    structural = set(model.vocabulary.structural.values())
    for text in (special, f"a{special}b", special * 3, f"{special}\n{special}", special[:-1] + special):
        ids = model.encode(text)
        assert not structural & set(ids)
        assert model.detokenizer().push(ids) == text


@pytest.mark.parametrize("special", KIMI_TAGS)
def test_no_special_token_of_kimi_comes_from_text(model_of: ModelOf, special: str) -> None:
    model = model_of("kimi-k2")
    assert not set(model.vocabulary.structural.values()) & set(model.encode(f"x {special}{special} y"))


def test_words_with_a_token_of_their_own_are_matched_in_text(model_of: ModelOf) -> None:
    """deepseek-llm has user-defined tokens such as ü: Hugging Face finds them in text, and so do we."""
    metadata = kit.tiny_vocab()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    types: list[int] = metadata["tokenizer.ggml.token_type"]  # type: ignore[assignment]
    used = tokens.index("ü")
    changes = {
        "tokenizer.ggml.tokens": ["unused" if n == used else t for n, t in enumerate(tokens)] + ["ü"],
        "tokenizer.ggml.token_type": [5 if n == used else t for n, t in enumerate(types)] + [4],
    }
    model = model_of("deepseek-r1", changes)
    ids = model.encode("Grüße")
    assert ids.count(len(tokens)) == 1
    assert model.detokenizer().push(ids) == "Grüße"
    oracle = reference({**metadata, **changes}, added=True)
    assert ids == oracle.encode("Grüße", add_special_tokens=False).ids


def test_half_a_surrogate_pair_is_refused(model_of: ModelOf) -> None:
    with pytest.raises(RequestError, match="send valid UTF-8"):
        model_of("deepseek-r1").encode("a\ud800b")


def test_a_long_prompt_is_encoded_quickly(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    text = "How many letters are there? 你好,世界!\n" * 6000
    start = time.process_time()
    ids = model.encode(text)
    assert len(ids) > 100_000
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pre", ["deepseek-v3", "deepseek-llm", "kimi-k2"])
@pytest.mark.parametrize("unit", [" ", "\n", "a", "A", "1", "你", "!", " \n", "\u0301"])
def test_no_text_takes_quadratic_time(model_of: ModelOf, pre: str, unit: str) -> None:
    model = model_of("deepseek-r1", pre=pre)
    start = time.process_time()
    model.encode(unit * 100_000 + "x")
    assert time.process_time() - start < 5


def test_others_go_on_while_a_long_text_is_encoded(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    words = " ".join(f"word{n}" for n in range(60_000))
    model.encode(words[:1000])
    woken = 0
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(model.encode, words)
        while not encoding.done():
            time.sleep(0.001)
            woken += 1
    assert woken > 10


def test_no_token_of_a_text_is_longer_than_told(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    text = "How many letters are there? 你好,世界! " * 50
    assert len(text.encode()) <= len(model.encode(text)) * model.longest_token
    assert model.longest_token > 1


def test_threads_may_encode_at_once(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    expected = [model.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: model.encode(TEXTS[n % len(TEXTS)]), range(400)))
    assert results == [expected[n % len(TEXTS)] for n in range(400)]


TOKENS: list[str] = kit.tiny_vocab()["tokenizer.ggml.tokens"]  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'.*byte-level BPE"),
        ({"tokenizer.ggml.model": None}, "lacks the metadata key tokenizer.ggml.model"),
        (
            {"tokenizer.ggml.pre": "deepseek-r1-qwen"},
            "'deepseek-r1-qwen', which is not of a DeepSeek.*distilled",
        ),
        ({"tokenizer.ggml.pre": None}, "lacks the metadata key tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": None}, "lacks the list tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "lacks the list tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "lacks the list tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["onlyone"]}, "merge 0 of tokenizer.ggml.merges is 'onlyone'"),
        ({"tokenizer.ggml.merges": ["Q zebra"]}, "merges does not fit tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type does not list one type for each"),
        ({"tokenizer.ggml.token_type": None}, "token_type does not list one type for each"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id is 99999, beyond the"),
        (
            {
                "tokenizer.ggml.tokens": [t if t != "A" else "Ax" for t in TOKENS],
                "tokenizer.ggml.merges": ["a b"],
            },
            "lacks a token for byte 0x41",
        ),
    ],
)
def test_a_wrong_vocabulary_is_refused(model_of: ModelOf, changes: dict[str, object], message: str) -> None:
    with pytest.raises(GgufError, match=message):
        model_of("deepseek-r1", changes)


def test_an_answer_must_be_able_to_end(model_of: ModelOf) -> None:
    nameless = ["<end>" if t == "<｜end▁of▁sentence｜>" else t for t in TOKENS]
    with pytest.raises(GgufError, match="eos_token_id, so an answer would never end"):
        model_of("deepseek-r1", {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.tokens": nameless})
    assert model_of("deepseek-r1", {"tokenizer.ggml.eos_token_id": None}).stop_ids == {1}
    assert model_of("deepseek-r1", {"tokenizer.ggml.eot_token_id": 7}).stop_ids == {1, 7}


def test_model_path_overrides_the_tokenizer(tmp_path: Path) -> None:
    metadata = kit.tiny_vocab(pre="kimi-k2")
    reference(metadata, added=True).save(str(tmp_path / "tokenizer.json"))
    path = kit.write_gguf(tmp_path / "m.gguf", metadata | {"tokenizer.ggml.pre": "deepseek-r1-qwen"})
    with GgufFile.open(path) as gguf:
        with pytest.raises(GgufError, match="deepseek-r1-qwen"):
            TextModel.from_gguf(gguf)
        model = TextModel.from_gguf(gguf, tmp_path)
        assert model.encode("It's 12345") == reference(metadata).encode("It's 12345").ids
        assert model.encode("<think>") != [model.vocabulary.structural["<think>"]]
        assert model.vocab_size == len(TOKENS)
        (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
        with pytest.raises(GgufError, match=r"tokenizer\.json is not a BPE tokenizer\.json"):
            TextModel.from_gguf(gguf, tmp_path)


def test_model_path_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    reference(kit.tiny_vocab(size=420), added=True).save(str(tmp_path / "tokenizer.json"))
    with (
        GgufFile.open(kit.write_gguf(tmp_path / "m.gguf", kit.tiny_vocab(size=300))) as gguf,
        pytest.raises(GgufError, match="give --model-path the folder of the same model"),
    ):
        TextModel.from_gguf(gguf, tmp_path)
