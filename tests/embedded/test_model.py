"""Trainer's forward, converter and importance against Hugging Face and ktd's own engine."""

from __future__ import annotations

from pathlib import Path
from random import Random

import gguf as gguf_py
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ktd.cache import LatentCache
from ktd.embedded.architecture import VOCAB_SIZE, new_model
from ktd.embedded.batches import IGNORE, Packer
from ktd.embedded.checkpoint import load_checkpoint, save_checkpoint
from ktd.embedded.convert import write_gguf
from ktd.embedded.corpus import Split, draw_dialogue
from ktd.embedded.fast_forward import FastForward
from ktd.embedded.importance import measure_importance
from ktd.embedded.template import SPECIAL_TOKENS, prompt_segments, reply_segments
from ktd.embedded.tokenizer import Encoder, texts_of, train_tokenizer
from ktd.gguf import GgufFile
from ktd.model import Batch, Piece, load_model
from ktd_kernels import Cpu


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = Random(1)
    drawn = [draw_dialogue(rng, Split.TRAIN) for _ in range(4000)]
    return train_tokenizer((text for d in drawn for text in texts_of(d)), VOCAB_SIZE)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = new_model().eval()
    for layer in made.model.layers[2:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    return made  # type: ignore[no-any-return]


def test_tokens_join_neither_digits_nor_a_space_with_a_letter(tokenizer: Tokenizer) -> None:
    texts = [tokenizer.decode([i]) for i in range(len(SPECIAL_TOKENS), VOCAB_SIZE)]
    assert not [t for t in texts if sum(c.isdigit() for c in t) > 1]
    assert not [t for t in texts if t[:1] == " " and t[1:2].isalpha()]
    assert tokenizer.encode("a 347").tokens == ["a", "Ġ", "3", "4", "7"]
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_the_fast_encoder_gives_the_tokenizers_ids(tokenizer: Tokenizer) -> None:
    rng, encoder = Random(9), Encoder(tokenizer)
    for _ in range(300):
        dialogue = draw_dialogue(rng, Split.TRAIN)
        expected: list[int] = []
        for segment in [*prompt_segments(dialogue), *reply_segments(dialogue)]:
            if segment in SPECIAL_TOKENS:
                expected.append(SPECIAL_TOKENS.index(segment))
            else:
                expected += tokenizer.encode(segment, add_special_tokens=False).ids
        ids, prompt = encoder.dialogue(dialogue)
        assert ids == expected
        assert tokenizer.decode(ids[prompt:], skip_special_tokens=False).endswith(
            f"{dialogue.last.answer}{SPECIAL_TOKENS[1]}"
        )


def test_packed_rows_teach_the_replies_and_nothing_else(tokenizer: Tokenizer) -> None:
    rows = Packer(tokenizer, 512, seed=4).rows(4)
    for ids, targets, positions, documents in zip(
        rows.ids, rows.targets, rows.positions, rows.documents, strict=True
    ):
        learnt = np.flatnonzero(targets != IGNORE)
        assert 100 < len(learnt) < 512
        inside = learnt[learnt < 511]
        assert (targets[inside] == ids[inside + 1]).all()
        assert (documents[inside] == documents[inside + 1]).all()
        starts = np.flatnonzero(positions == 0)
        assert (ids[starts] == 0).all()
        assert len(starts) == documents[-1] + 1


def test_the_trainers_forward_is_hugging_faces(model: torch.nn.Module) -> None:
    ids = torch.randint(0, VOCAB_SIZE, (2, 70), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(70).expand(2, -1)
    fast = FastForward(model)
    with torch.inference_mode():
        hidden, loads = fast(ids, positions, torch.zeros_like(ids))
        torch.testing.assert_close(fast.logits(hidden), model(ids).logits, rtol=1e-4, atol=1e-4)
        assert loads.sum(-1).tolist() == pytest.approx([4.0, 4.0])
        # Two dialogues in a row do not see each other.
        hidden, _ = fast(ids, positions % 40, positions // 40)
        alone = model(ids[:, 40:]).logits
        torch.testing.assert_close(fast.logits(hidden)[:, 40:], alone, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_comes_back(model: torch.nn.Module, tmp_path: Path) -> None:
    paths = save_checkpoint(model, tmp_path)
    assert all(path.stat().st_size <= 16 << 20 for path in paths)
    for (name, a), b in zip(
        model.state_dict().items(), load_checkpoint(tmp_path).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kv_b", ["split", "merged"])
def test_the_file_holds_the_model(
    model: torch.nn.Module, tokenizer: Tokenizer, tmp_path: Path, kv_b: str
) -> None:
    path = tmp_path / "f32.gguf"
    write_gguf(model, tokenizer, path, weights="F32", kv_b=kv_b)  # type: ignore[arg-type]
    names = {t.name for t in gguf_py.GGUFReader(path).tensors}
    assert ("blk.0.attn_kv_b.weight" in names) == (kv_b == "merged")
    assert ("blk.3.attn_k_b.weight" in names) == (kv_b == "split")
    assert {"blk.1.ffn_gate.weight", "blk.2.ffn_gate_exps.weight", "blk.2.exp_probs_b.bias"} <= names
    assert len(names) == 61 + (4 if kv_b == "split" else 0)
    ids = list(range(20, 80))
    with GgufFile.open(path) as gguf, torch.inference_mode():
        ours = load_model(gguf, Cpu(1), context=256, progress=lambda fraction: None)
        cache = LatentCache(ours.config.layers, 1, 256, ours.config.latent, "f32")
        logits = ours.forward(Batch.of([Piece(ids, 0, [0], len(ids))], 256), cache)
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_importance_has_llama_cpps_sizes(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    found = measure_importance(model, tokenizer, dialogues=2)
    assert found["blk.2.ffn_gate_exps.weight"].size == 16 * 256
    assert found["blk.0.attn_v_b.weight"].size == 8 * 256
    assert found["output.weight"].size == 256
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in found.values())
