"""Templates run as Hugging Face runs them, in a sandbox, and fail with a sentence."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kit
import pytest
from kit_text import ModelOf, shown, template_source

from ktd.errors import GgufError, RequestError, SettingsError
from ktd.gguf import GgufFile
from ktd.text import TextModel
from ktd.text.chat_template import ChatTemplate
from ktd.types import Message

QUESTION = [Message("user", "Q")]
SAYS_IT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, "test.gguf").render(variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ x | tojson }}", '{"a": "<é&>"}'),
        ("{{ x | tojson(indent=1) }}", '{\n "a": "<é&>"\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("  {% if true %}\nyes\n  {% endif %}\nend", "yes\nend"),
        ("{% generation %}a{{ 1 + 1 }}{% endgeneration %}b", "a2b"),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("{{ undefined_name }}.{{ x.missing }}", "."),
        (
            "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ 'ab' * 2 }}{{ 2 ** 3 }}",
            "2abab8",
        ),
        ("{% set a = [1] + [2] %}{{ a }}{{ (1, 2) + (3,) }}", "[1, 2](1, 2, 3)"),
    ],
)
def test_what_hugging_face_gives_templates(source: str, text: str) -> None:
    assert render(source, x={"a": "<é&>"}) == text


def test_a_template_may_refuse() -> None:
    with pytest.raises(RequestError, match="refuses this conversation: system first"):
        render("{{ raise_exception('system first') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages.pop() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[7]['x'].y }}",
        "{{ nothing.deeper }}",
        "{{ none_such() }}",
        "{% include 'other' %}",
        "{{ x | tojson }}",
    ],
)
def test_a_template_that_goes_wrong_does_no_harm(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(RequestError, match=r"chat template of test\.gguf") as caught:
        render(source, messages=[{"role": "user", "content": "x"}], x=object())
    assert time.thread_time() - start < 3
    assert "\n" not in str(caught.value)


def test_a_template_that_runs_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.text.sandbox._MAX_SECONDS", 0.3)
    for loop in (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set s = 'a' * 60000 %}{% for i in s %}{% for j in s %}{% endfor %}{% endfor %}",
        "{{ range(99999) | select('in', range(99999) | list) | list }}",
    ):
        start = time.thread_time()
        with pytest.raises(RequestError, match=r"it ran for more than 0\.3 seconds"):
            render(loop)
        assert time.thread_time() - start < 3


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' | format(10 ** 10, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
        "{% set s = 'a' * 60000 %}{{ s | replace('a', s) }}",
        "{% set s = 'a' * 60000 %}{{ s.replace('a', s) }}",
        "{% set s = 'a' * 60000 %}{{ s | join(s) }}",
        "{% set s = 'a' * 60000 %}{{ ''.join([s] * 60000) }}",
        "{% set s = 'a' * 60000 %}{{ s | map('replace', 'a', s) | join }}",
        "{{ [1] | tojson(indent=10 ** 10) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{% set s = '\\n' * 60000 %}{{ s | indent(60000) }}",
    ],
)
def test_a_template_that_asks_for_too_much_is_stopped_before(source: str) -> None:
    """Each of these would take 3.6 GB or more, at once."""
    start = time.thread_time()
    with pytest.raises(RequestError, match=r"was stopped \(it(s output| asks)"):
        render(source)
    assert time.thread_time() - start < 3


@pytest.mark.parametrize("use", ["urlize", "wordwrap", "pprint", "sort|first", "max"])
def test_a_filter_that_is_slow_on_long_texts_gets_none(use: str) -> None:
    """Each takes seconds for a text of some MB, in calls that no limit of time interrupts."""
    source = "{{ ('a b ' * 20000)|" + use + " }}"
    assert render(source.replace("20000", "1"))
    with pytest.raises(RequestError, match="was stopped"):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "damaged at line 1"),
        ("fine\n{% for m in messages %}", "damaged at line"),
        ("{{ 'open", "damaged at line 1"),
        ("{% unheard_of %}", "damaged at line 1 .*unknown tag"),
        ("{{ x | no_such_filter }}", "damaged at line 1 .*no_such_filter"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled"),
        ("{{ raise_exception('never') }}", "refuses this conversation: never"),
        ("{{ messages[5].content }}{{ messages[5].content.x }}", "failed on this conversation"),
        ("hello", "does not print the user's message"),
    ],
)
def test_a_damaged_template_is_refused_when_the_file_is_opened(
    model_of: ModelOf, source: str, message: str
) -> None:
    with pytest.raises(GgufError, match=message) as caught:
        model_of("{# #}" + source)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_template_needs_model_path(model_of: ModelOf) -> None:
    with pytest.raises(GgufError, match=r"no chat template .* as --model-path"):
        model_of(SAYS_IT, {"tokenizer.chat_template": None})


def opened(folder: Path, gguf_folder: Path, template: str | None = None) -> str:
    with GgufFile.open(kit.write_gguf(gguf_folder / "m.gguf", kit.tiny_vocab(template))) as gguf:
        model = TextModel.from_gguf(gguf, folder)
        return shown(model, model.render(QUESTION))


def test_model_path_overrides_the_template(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    bos = "<｜begin▁of▁sentence｜>"
    config = folder / "tokenizer_config.json"
    config.write_text("{}")
    assert opened(folder, tmp_path, SAYS_IT) == f"{bos}Q"
    config.write_text(json.dumps({"chat_template": SAYS_IT + "!"}))
    assert opened(folder, tmp_path) == f"{bos}Q!"
    named = [{"name": "tool_use", "template": SAYS_IT}, {"name": "default", "template": SAYS_IT + "?"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert opened(folder, tmp_path) == f"{bos}Q?"
    (folder / "chat_template.jinja").write_text(SAYS_IT + "ü", encoding="utf-8")
    assert opened(folder, tmp_path) == f"{bos}Qü"


def test_a_name_on_the_hub_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert opened(Path("deepseek-ai/DeepSeek-V2-Lite-Chat"), tmp_path, SAYS_IT).endswith("Q")
    (record,) = [record for record in caplog.records if record.name.startswith("ktd.text")]
    assert "--model-path deepseek-ai/DeepSeek-V2-Lite-Chat is no folder here" in record.getMessage()


def test_a_bad_model_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("./a/b/c", "/deepseek-ai/V2", "models"):
        with pytest.raises(SettingsError, match="is not a folder"):
            opened(Path(path), tmp_path, SAYS_IT)
    with pytest.raises(SettingsError, match=r"empty holds none of tokenizer\.json, tokenizer_config\.json"):
        opened(tmp_path / "empty", tmp_path, SAYS_IT)
    with pytest.raises(SettingsError, match="nowhere is not a folder"):
        opened(tmp_path / "nowhere", tmp_path, SAYS_IT)
    for content in ("{", "[]", '{"chat_template": [{"name": "default"}]}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(GgufError, match=r"tokenizer_config\.json cannot be read"):
            opened(tmp_path, tmp_path, SAYS_IT)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(GgufError, match=r"chat_template\.jinja cannot be read"):
        opened(tmp_path, tmp_path, SAYS_IT)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(GgufError, match=r"template of .*chat_template\.jinja is damaged at line 1"):
        opened(tmp_path, tmp_path, SAYS_IT)


def test_threads_may_render_at_once(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: shown(model, model.render([Message("user", f"<{n}>")])), range(200)))
    assert all(f"⟨{n}>" in text for n, text in enumerate(texts))


def test_every_fixture_is_a_template() -> None:
    for name in ("deepseek-r1", "deepseek-r1-2025-01", "deepseek-r1-0528", "deepseek-v3-0324", "kimi-k2"):
        assert not ChatTemplate(template_source(name), name).has_thinking_switch
    assert ChatTemplate(template_source("deepseek-v3.1"), "v3.1").has_thinking_switch
