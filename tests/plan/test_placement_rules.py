"""Placement rules: whose weights they move, what is refused, and what the plan makes of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from ktd.budget import Budget
from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.gpu import Gpu
from ktd.main import run
from ktd.model import ModelConfig
from ktd.placement_rules import read_rules
from ktd.plan import Plan, make_plan
from ktd.split import Pins

GPU = "cuda:0"
TWO = (GPU, "cuda:1")
MIB = 2**20
# As KTransformers' files for one GPU: rules by class, by name, with devices and without.
KTRANSFORMERS = r"""
- match:
    class: ktransformers.models.modeling_deepseek_v3.DeepseekV3YarnRotaryEmbedding
  replace:
    class: ktransformers.operators.RoPE.YarnRotaryEmbedding
    kwargs: {generate_device: "cuda", prefill_device: "cuda"}
- match:
    name: "^model\\.layers\\.(?!.*self_attn\\.kv_b_proj).*$"
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: "cuda", prefill_device: "cuda", generate_op: "KLinearMarlin"}
- match:
    name: "^model\\.layers\\..*\\.mlp$"
    class: ktransformers.models.modeling_deepseek_v3.DeepseekV3MoE
  replace:
    kwargs: {generate_device: "cuda"}
- match:
    class: ktransformers.models.modeling_deepseek_v3.MoEGate
  replace:
    kwargs: {generate_device: "cuda:0"}
- match:
    name: "^model\\.layers\\..*\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {prefill_device: "cuda", generate_device: "cpu", generate_op: "KExpertsCPU", out_device: "cuda"}
  recursive: False
- match:
    name: "^model\\.layers\\..*\\.self_attn$"
  replace:
    kwargs: {generate_device: "cuda"}
- match:
    name: "^model$"
  replace:
    class: ktransformers.operators.models.KDeepseekV2Model
    kwargs: {per_layer_prefill_intput_threshold: 0}
- match:
    name: "^model.embed_tokens"
  replace:
    class: default
    kwargs: {generate_device: "cpu", prefill_device: "cpu"}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "model.gguf"
    assert run(["synth", "--shape", "tiny-r1", "--mix", "q8_0", "-o", str(path)]) == 0
    return path


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    return tmp_path / "rules.yaml"


def pinned(model: Path, rules: Path, text: str, gpus: Sequence[str] = (GPU,)) -> dict[int, bool]:
    rules.write_text(textwrap.dedent(text))
    with GgufFile.open(model) as gguf:
        return dict(read_rules(rules, gguf, ModelConfig.from_gguf(gguf), gpus).experts)


def pinned_gpus(model: Path, rules: Path, text: str) -> dict[int, str]:
    rules.write_text(textwrap.dedent(text))
    with GgufFile.open(model) as gguf:
        return dict(read_rules(rules, gguf, ModelConfig.from_gguf(gguf), TWO).gpus)


def refusal(model: Path, rules: Path, text: str, gpus: Sequence[str] = (GPU,)) -> str:
    with pytest.raises(SettingsError) as caught:
        pinned(model, rules, text, gpus)
    return str(caught.value).replace(str(rules), "FILE")


# Their files for two GPUs, of which one has all layers from the third on.
TWO_GPUS = r"""
- match: {name: "^model.embed_tokens"}
  replace: {class: default, kwargs: {generate_device: "cpu", prefill_device: "cpu"}}
- match:
    name: "^model\\.layers\\.[01]\\.(?!self_attn\\.kv_b_proj).*$"
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: "cuda:0", prefill_device: "cuda:0"}
- match:
    name: "^model\\.layers\\.([2-9])\\.(?!self_attn\\.kv_b_proj).*$"
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: "cuda:1", prefill_device: "cuda:1"}
- match: {name: "^model\\.layers\\.[01]\\.mlp\\.experts$"}
  replace: {kwargs: {prefill_device: "cuda:0", generate_device: "cpu", out_device: "cuda:0"}}
  recursive: False
- match: {name: "^model\\.layers\\.[2-9]\\.mlp\\.experts$"}
  replace: {kwargs: {prefill_device: "cuda:1", generate_device: "cpu", out_device: "cuda:1"}}
  recursive: False
- match: {name: "^model$"}
  replace: {kwargs: {transfer_map: {2: "cuda:1"}}}
- match: {name: "^model\\.layers\\.[01]\\."}
  replace: {class: default, kwargs: {generate_device: "cuda:0"}}
- match: {name: "(^model\\.layers\\.[2-9]\\.)|(model.norm)|(lm_head)"}
  replace: {class: default, kwargs: {generate_device: "cuda:1"}}
"""


def moe_layers(model: Path) -> range:
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
    return range(config.dense_layers, config.layers)


def test_names_of_tensors_choose_layers(model: Path, rules: Path) -> None:
    first, *_, last = moe_layers(model)
    text = f"""
        - match: {{name: 'blk\\.{last}\\.ffn_(gate|up|down)_exps'}}
          replace: {{device: 'cuda:0'}}
        - match: {{name: 'blk\\.{first}\\..*_exps'}}
          replace: {{device: cpu}}
    """
    assert pinned(model, rules, text) == {first: False, last: True}


def test_ktransformers_own_rules_keep_the_experts_in_memory(model: Path, rules: Path) -> None:
    assert pinned(model, rules, KTRANSFORMERS) == dict.fromkeys(moe_layers(model), False)


def test_the_first_rule_counts_and_the_nearest_module(model: Path, rules: Path) -> None:
    first, *others = moe_layers(model)
    text = f"""
        - match: {{name: 'model\\.layers\\.{first}\\.mlp\\.experts'}}
          replace: {{kwargs: {{generate_device: cuda}}}}
        - match: {{name: '_exps', }}
          replace: {{device: cpu}}
        - match: {{name: '^model\\.layers\\.\\d+\\.mlp$'}}
          replace: {{kwargs: {{generate_device: cuda}}}}
    """
    assert pinned(model, rules, text) == {first: True} | dict.fromkeys(others, False)
    above = """
        - match: {class: models.DeepseekV3MoE}
          replace: {device: cuda}
    """
    assert pinned(model, rules, above) == dict.fromkeys(moe_layers(model), True)


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ("name: 'blk\\.999\\.ffn_.*_exps'", "matches nothing in model.gguf"),
        ("name: 'model\\.layers\\.3\\.mlp\\.expert$'", "matches nothing"),
        ("name: embed_tokens, class: torch.nn.Linear", "matches nothing"),
        (
            "class: transformers.Qwen2MoeSparseMoeBlock",
            "no module of DeepSeek's models is a transformers.Qwen2",
        ),
        ("name: 'blk(3'", "no regular expression"),
        ("tensor: 'blk.3'", "a match has class, name, but no tensor"),
        ("", "matches neither a name nor a class"),
        ("name: [a]", "a text belongs here"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused(model: Path, rules: Path, match: str, said: str) -> None:
    text = f"""
        - match: {{name: _exps}}
          replace: {{device: cpu}}
        - match: {{{match}}}
          replace: {{device: cpu}}
    """
    for gpus in ((GPU,), ()):
        found = refusal(model, rules, text, gpus)
        assert found.startswith("Line 4 of the rules FILE")
        assert said in found


@pytest.mark.parametrize(
    ("name", "replace", "said"),
    [
        ("_exps", "device: 'cuda:1'", "names the device cuda:1"),
        ("_exps", "device: tpu", "names the device tpu"),
        ("'^model$'", "kwargs: {transfer_map: {2: 'cuda:1'}}", "names the device cuda:1"),
        ("_exps", "kwargs: {generate_device: cpu, prefill_device: 'cuda:7'}", "names the device cuda:7"),
        ("_exps", "device: cpu, op: x", "a replace has class, device, kwargs, but no op"),
        ("self_attn", "device: cpu", "into memory: with a GPU, only routed experts"),
        ("ffn_gate_inp", "device: cpu", "into memory: with a GPU, only routed experts"),
        ("token_embd", "device: cuda", "it stays in memory"),
        ("ffn_up_exps", "device: cuda", "gate, up and down of a layer lie on one device"),
    ],
)
def test_a_rule_that_cannot_be_met_is_refused(
    model: Path, rules: Path, name: str, replace: str, said: str
) -> None:
    found = refusal(model, rules, f"- match: {{name: {name}}}\n  replace: {{{replace}}}\n")
    assert "of the rules FILE" in found
    assert said in found


def test_ktransformers_rules_for_two_gpus_part_the_layers(model: Path, rules: Path) -> None:
    rules.write_text(TWO_GPUS)
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
        pins = read_rules(rules, gguf, config, TWO)
    assert pins.experts == dict.fromkeys(moe_layers(model), False)
    assert pins.gpus == {i: TWO[i > 1] for i in range(config.layers)}
    assert "names the device cuda:1, but ktd computes on cpu, cuda:0." in refusal(model, rules, TWO_GPUS)
    one = KTRANSFORMERS.replace('"cuda"', '"cuda:0"')
    assert set(pinned_gpus(model, rules, one).values()) == {"cuda:0"}
    assert pinned_gpus(model, rules, KTRANSFORMERS.replace("cuda:0", "cuda")) == {}


def test_experts_of_a_layer_take_the_layer_along(model: Path, rules: Path) -> None:
    text = "- match: {name: 'blk.2.ffn_.*_exps'}\n  replace: {device: 'cuda:1'}\n"
    assert pinned_gpus(model, rules, text) == {2: "cuda:1"}
    assert pinned(model, rules, text, TWO) == {2: True}
    head = "- match: {name: '^output.weight'}\n  replace: {device: 'cuda:1'}\n"
    assert pinned_gpus(model, rules, head) == {moe_layers(model)[-1]: "cuda:1"}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            "blk.2.attn",
            "blk.2.ffn_gate_inp",
            "Line 3 of the rules FILE puts blk.2.ffn_gate_inp.weight on cuda:1",
        ),
        ("blk.2.attn", "blk.2.ffn_.*_exps", "the weights of a layer lie on one GPU"),
        ("blk.3.attn", "^output.weight", "puts output.weight on cuda:1, but blk.3.attn"),
        ("blk.2.attn", "blk.1.attn", "Line 1 of the rules FILE puts blk.2.attn"),
        ("blk.2.attn", "blk.1.attn", "on cuda:0, behind layers on cuda:1"),
    ],
)
def test_gpus_that_cannot_have_what_rules_give_them(
    model: Path, rules: Path, first: str, second: str, said: str
) -> None:
    text = "".join(
        f"- match: {{name: '{name}'}}\n  replace: {{device: '{gpu}'}}\n"
        for name, gpu in zip((first, second), TWO, strict=True)
    )
    assert said in refusal(model, rules, text, TWO)


def test_without_a_gpu_only_the_cpu_can_be_asked_for(model: Path, rules: Path) -> None:
    cpu = "- match: {name: .}\n  replace: {device: cpu}\n"
    assert not any(pinned(model, rules, cpu, ()).values())
    assert "but no GPU is used" in refusal(model, rules, KTRANSFORMERS, ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("match: {name: x}", "are no list"),
        ("- 3", "Line 1 of the rules FILE begins no rule"),
        ("- match: {name: x}", "Line 1 of the rules FILE begins no rule of match and replace"),
        ("- match: x\n  replace: {}", "Line 1 of the rules FILE begins no match"),
        ("- match:\n    name: [\n", "are not YAML: line"),
        ("- \x01", "are not YAML"),
    ],
)
def test_a_file_of_another_form_is_refused(model: Path, rules: Path, text: str, said: str) -> None:
    assert said in refusal(model, rules, text)


def planned(model: Path, vram: int, layers: dict[int, bool]) -> Plan:
    with GgufFile.open(model) as gguf:
        return make_plan(
            gguf,
            ModelConfig.from_gguf(gguf),
            budget=Budget(1024 * MIB, {GPU: vram}),
            packer=None,
            context=512,
            sequences=1,
            chunk_tokens=64,
            cache_type="bf16",
            pins=Pins(layers),
        )


def test_the_plan_puts_experts_where_the_rules_want_them(model: Path) -> None:
    first, *others = moe_layers(model)
    last = others[-1]
    roomy = planned(model, 8192 * MIB, {first: False})
    assert roomy.placement.expert_layers_on_gpu == frozenset(others)
    assert roomy.routed > 0
    none = planned(model, 8192 * MIB, dict.fromkeys(moe_layers(model), False))
    assert none.placement.expert_layers_on_gpu == frozenset()
    one_layer = roomy.vram.experts // len(others)
    tight = none.vram.total + one_layer + one_layer // 2
    assert planned(model, tight, {}).placement.expert_layers_on_gpu == {first}
    chosen = planned(model, tight, {last: True})
    assert chosen.placement.expert_layers_on_gpu == {last}
    assert chosen.vram.total <= tight
    with pytest.raises(SettingsError, match="The rules put the routed experts of 2 layers on the GPU"):
        planned(model, tight, {first: True, last: True})


def test_the_commands_take_the_rules(
    model: Path, rules: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(GPU, "a GPU", free=16 << 30, total=16 << 30)
    monkeypatch.setattr("ktd.gpu.find_gpus", lambda: [gpu])
    monkeypatch.setattr("ktd.gpu.launcher_lacks", lambda: None)
    monkeypatch.setattr("ktd.prediction.Sample.seconds_a_token", lambda self: 0.1)
    first, *_ = moe_layers(model)
    rules.write_text(f"- match: {{name: 'blk.{first}..*_exps'}}\n  replace: {{device: cpu}}\n")
    command = ["plan", str(model), "--ram", "1GiB", "--vram", "8GiB"]
    assert run(command) == 0
    whole = capsys.readouterr().out
    assert run([*command, "--optimize_config_path", str(rules)]) == 0
    layers = moe_layers(model)
    assert f"{len(layers)}: {first}-{layers[-1]}" in whole
    assert f"{len(layers) - 1}: " in capsys.readouterr().out
    rules.write_text("- match: {name: nothing}\n  replace: {device: cpu}\n")
    with pytest.raises(SettingsError, match="matches nothing"):
        run([*command, "--optimize_config_path", str(rules)])
