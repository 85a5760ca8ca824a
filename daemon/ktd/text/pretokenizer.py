"""How text is cut before byte-pair merging, per value of `tokenizer.ggml.pre`.

The patterns are those of each model's tokenizer.json (DeepSeek) or tokenization_kimi.py (Kimi). They are
part of the model: another cut gives other tokens than it was trained on.
"""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

from ktd.errors import GgufError

# The letters deepseek-llm keeps together: cased letters of the Unicode version its authors used.
_CASED_LETTERS = """
0041-005A 0061-007A 00B5 00C0-00D6 00D8-00F6 00F8-01BA 01BC-01BF 01C4-0293 0295-02AF 0370-0373 0376
0377 037B-037D 037F 0386 0388-038A 038C 038E-03A1 03A3-03F5 03F7-0481 048A-052F 0531-0556 10A0-10C5
13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45
1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3
1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D
A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A
10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
_ASCII_AND_CJK_PUNCTUATION = "0021-002F 003A-007E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_CJK_AND_HANGUL = "4E00-9FA5 0800-4E00 AC00-D7FF"
_CJK_AND_KANA = "4E00-9FA5 3040-309F 30A0-30FF"

_WORDS_DEEPSEEK_V3 = "|".join(
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_UPPER_KIMI = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER_KIMI = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING_KIMI = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS_KIMI = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER_KIMI}*{_LOWER_KIMI}+{_ENDING_KIMI}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER_KIMI}+{_LOWER_KIMI}*{_ENDING_KIMI}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def _characters(ranges: str) -> str:
    """A regular expression class of the code points listed as hexadecimal ranges."""
    return "[" + "".join("-".join(rf"\x{{{end}}}" for end in r.split("-")) for r in ranges.split()) + "]"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _deepseek_llm() -> list[pre_tokenizers.PreTokenizer]:
    return [
        _split(r"[\r\n]"),
        _split(rf"\s?{_characters(_CASED_LETTERS)}+"),
        _split(rf"\s?{_characters(_ASCII_AND_CJK_PUNCTUATION)}+"),
        _split(r"\s+$"),
        _split(f"{_characters(_CJK_AND_HANGUL)}+"),
        pre_tokenizers.Digits(individual_digits=True),
    ]


def _deepseek_v3() -> list[pre_tokenizers.PreTokenizer]:
    return [_split(r"\p{N}{1,3}"), _split(f"{_characters(_CJK_AND_KANA)}+"), _split(_WORDS_DEEPSEEK_V3)]


def _kimi_k2() -> list[pre_tokenizers.PreTokenizer]:
    return [_split(_WORDS_KIMI)]


_SPLITTERS = {"deepseek-llm": _deepseek_llm, "deepseek-v3": _deepseek_v3, "kimi-k2": _kimi_k2}


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that GGUF calls `name`, ending in the byte-level alphabet.

    Raises GgufError for a name of another model family.
    """
    splitter = _SPLITTERS.get(name)
    if splitter is None:
        raise GgufError(
            f"tokenizer.ggml.pre is {name!r}, which is not of a DeepSeek or Kimi model (ktd knows"
            f" {', '.join(_SPLITTERS)}): give a GGUF of such a model itself, not of a distilled one"
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splitter(), byte_level])
