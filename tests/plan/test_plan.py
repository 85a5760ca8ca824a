"""The memory plan: what fits, what is said when it does not, and that budgets are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.main import run
from ktd.model import ModelConfig
from ktd.plan import PAGE_SIZE, Plan, available_memory, make_plan

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "model.gguf"
    assert run(["synth", "--shape", "tiny-r1", "--mix", "q8_0", "-o", str(path)]) == 0
    return path


def plan_of(model: Path, *, ram: int | None = None, context: int | None = None, sequences: int = 8) -> Plan:
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
        return make_plan(
            gguf, config, ram=ram, context=context, sequences=sequences, chunk_tokens=64, cache_type="bf16"
        )


def test_with_room_every_sequence_gets_the_models_own_context(model: Path) -> None:
    plan = plan_of(model, ram=1024 * MIB)
    assert plan.context == 4096
    assert plan.cache_tokens == 8 * (4096 + PAGE_SIZE)
    assert plan.from_disk == 0
    with GgufFile.open(model) as gguf:
        assert plan.routed + plan.dense == gguf.nbytes
        config = ModelConfig.from_gguf(gguf)
        assert plan.cache_per_token == config.layers * config.latent * 2
        assert config.moe
        assert plan.routed_per_token == plan.routed * config.moe.used // config.moe.experts


def test_a_budget_is_kept_and_the_context_never_silently_less_than_asked(model: Path) -> None:
    whole = plan_of(model, ram=1024 * MIB)
    least = whole.routed + whole.dense + whole.buffers
    for extra in (12, 20, 40, 80):
        plan = plan_of(model, ram=least + extra * MIB, context=4096)
        assert plan.context == 4096
        assert plan.cache_tokens >= 4096
        assert plan.cache_tokens % PAGE_SIZE == 0
        assert least + plan.cache <= plan.ram + plan.from_disk
        assert plan.from_disk == 0


def test_experts_that_do_not_fit_are_left_on_disk_and_counted(model: Path) -> None:
    whole = plan_of(model, ram=1024 * MIB)
    ram = whole.dense + whole.buffers + 4096 * whole.cache_per_token + whole.routed // 2
    plan = plan_of(model, ram=ram)
    assert plan.context == 4096
    assert plan.from_disk == pytest.approx(whole.routed / 2, rel=0.01)


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(model: Path) -> None:
    whole = plan_of(model, ram=1024 * MIB)
    ram = whole.dense + whole.buffers + 1000 * whole.cache_per_token
    with pytest.raises(SettingsError, match=r"set --context to at most 960") as caught:
        plan_of(model, ram=ram, context=2048)
    assert str(caught.value).count(".") <= 4  # one sentence and two decimals
    assert plan_of(model, ram=ram, context=960).context == 960


def test_more_than_the_model_was_made_for_is_refused(model: Path) -> None:
    with pytest.raises(SettingsError, match="made for 4096"):
        plan_of(model, ram=1024 * MIB, context=4097)


def test_the_rate_is_the_bandwidth_over_the_bytes_of_a_token(model: Path) -> None:
    plan = plan_of(model, ram=1024 * MIB)
    read = plan.routed_per_token + plan.dense_per_token
    assert plan.tokens_per_second(10.0 * read) == pytest.approx(10.0)
    assert read < plan.routed + plan.dense


def test_available_memory_is_positive_and_within_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_memory() <= total


def test_the_command_prints_the_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(model), "--ram", "1GiB"]) == 0
    shown = capsys.readouterr().out
    assert "4,096 tokens" in shown
    assert "tokens/s" in shown
    with pytest.raises(SettingsError, match="--ram"):
        run(["plan", str(model), "--ram", "lots"])
