"""The forward pass of DeepseekV3ForCausalLM for training: the same function of the same parameters, made
for a GPU.

Hugging Face's loop over experts is too slow for a model whose layers take microseconds. Here all experts
of a layer run as one gated layer of width experts x expert width, the routing weights (zero for experts
not chosen) scaling its parts. A test holds the two against each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FastForward(nn.Module):
    """Wraps a model; its parameters stay the model's own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and expert loads of packed rows.

        ids, positions, documents: int64 [rows, length]; attention stays within a document (equal numbers)
        and looks back only. Returns the normed hidden states [rows, length, hidden] and the share of
        choices that each expert of each MoE layer got, float32 [MoE layers, experts].
        """
        decoder = self.model.model
        x = decoder.embed_tokens(ids)
        length = ids.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = ((documents[:, :, None] == documents[:, None, :]) & past)[:, None]
        angles = positions[..., None].float() * decoder.rotary_emb.inv_freq.float()
        scale = decoder.rotary_emb.attention_scaling
        turn = (angles.cos() * scale, angles.sin() * scale)
        loads = []
        for layer in decoder.layers:
            x = x + self._attention(layer.self_attn, _norm(layer.input_layernorm, x), turn, mask)
            h = _norm(layer.post_attention_layernorm, x)
            if hasattr(layer.mlp, "experts"):
                y, load = self._experts(layer.mlp, h)
                loads.append(load)
            else:
                y = _mlp(layer.mlp, h)
            x = x + y
        return _norm(decoder.norm, x), torch.stack(loads)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of hidden states [..., hidden]."""
        out: Tensor = self.model.lm_head(hidden)
        return out.float()

    def _attention(self, attn: Any, h: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        c = self.config
        rows, length, _ = h.shape
        q = attn.q_b_proj(_norm(attn.q_a_layernorm, attn.q_a_proj(h)))
        q = q.view(rows, length, c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim).transpose(
            1, 2
        )
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        latent, k_rope = attn.kv_a_proj_with_mqa(h).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        kv = attn.kv_b_proj(_norm(attn.kv_a_layernorm, latent))
        kv = kv.view(rows, length, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim).transpose(1, 2)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope = _rope(k_rope[:, None], turn).expand(-1, c.num_attention_heads, -1, -1)
        q = torch.cat((q_nope, _rope(q_rope, turn)), dim=-1)
        k = torch.cat((k_nope, k_rope.to(k_nope.dtype)), dim=-1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=mask, scale=attn.scaling)
        result: Tensor = attn.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return result

    def _experts(self, moe: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        flat = h.reshape(-1, c.hidden_size)
        with torch.autocast(h.device.type, enabled=False):
            scores = F.linear(flat.float(), moe.gate.weight.float()).sigmoid()
            choice = scores.detach() + moe.gate.e_score_correction_bias
            groups = choice.view(-1, c.n_group, c.n_routed_experts // c.n_group)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
            allowed = torch.zeros_like(groups[..., 0]).scatter(1, best, 1.0)[..., None].expand_as(groups)
            choice = choice.masked_fill(allowed.reshape(choice.shape) == 0, float("-inf"))
            chosen = torch.zeros_like(scores).scatter(
                1, choice.topk(c.num_experts_per_tok, dim=-1).indices, 1.0
            )
            weights = scores * chosen
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        gate_up = moe.experts.gate_up_proj
        width = gate_up.shape[1] // 2
        gate = F.linear(flat, gate_up[:, :width].reshape(-1, c.hidden_size))
        up = F.linear(flat, gate_up[:, width:].reshape(-1, c.hidden_size))
        hidden = (F.silu(gate) * up).view(-1, c.n_routed_experts, width) * weights[..., None].to(gate.dtype)
        down = moe.experts.down_proj.transpose(0, 1).reshape(c.hidden_size, -1)
        routed = F.linear(hidden.reshape(-1, c.n_routed_experts * width), down)
        return routed.view_as(h) + _mlp(moe.shared_experts, h), chosen.mean(0)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _mlp(mlp: Any, h: Tensor) -> Tensor:
    out: Tensor = mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return out


def _rope(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x [rows, heads, length, rope] in interleaved pairs; the result's order is the same for q and k,
    which is all that a product of the two depends on."""
    cos, sin = (t[:, None] for t in turn)
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
