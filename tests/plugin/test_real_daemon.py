"""The Pipe on `ktd serve` with the embedded model: what a scripted daemon cannot show."""

from __future__ import annotations

from pipe_grpc_kit import pipe_to
from pipe_kit import ask, browser_body
from webui_kit import real_daemon


async def test_the_model_answers_when_its_thinking_budget_is_used_up() -> None:
    with real_daemon() as daemon:
        async with pipe_to(daemon.address) as pipe:
            body = browser_body("What is 347 + 286?", model="ktd.any", temperature=0)
            free = await ask(pipe, body)
            cut = await ask(pipe, body, __user__={"valves": pipe.UserValves(THINKING_BUDGET=20)})
    assert (free.error, cut.error) == (None, None)
    begun = cut.thought.removesuffix("\n\nThe thinking budget is used up: I answer now.")
    assert begun != cut.thought
    assert free.thought.startswith(begun)
    assert cut.text.startswith("347 + 286 =")
    assert cut.usage is not None
    assert cut.usage["completion_tokens_details"] == {"reasoning_tokens": 20}
    assert cut.usage["prompt_tokens"] == free.usage["prompt_tokens"]  # type: ignore[index]
