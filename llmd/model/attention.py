"""Self-attention of one layer over the paged cache: projections around the two kernels that do the work."""

from dataclasses import dataclass

from torch import Tensor

from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import LayerCache
from llmd.model.layers import Linear, RmsNorm
from llmd_kernels import paged_attention, rope_kv_write


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    qkv: Linear  # the queries' rows, then keys', then values'
    o: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    norm_by_head: bool  # the two norms are of single heads; otherwise of all heads of the projection together
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos_sin: Tensor | None  # [max_model_len, rotary_dim]; None = no positions
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None  # [num_heads]
    rope_interleaved: bool

    def __call__(self, x: Tensor, inputs: ModelInputs, cache: LayerCache) -> Tensor:
        """[num_tokens, hidden_size] → the same. Writes the tokens' keys and values to their slots."""
        qkv = self.qkv(x)
        if not self.norm_by_head:
            self._norm_projections(qkv)
        q = rope_kv_write(
            qkv,
            positions=inputs.positions,
            slots=inputs.slots,
            k_cache=cache.k,
            v_cache=cache.v,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            cos_sin=self.cos_sin,
            interleaved=self.rope_interleaved,
            q_norm=self.q_norm.weight if self.q_norm and self.norm_by_head else None,
            k_norm=self.k_norm.weight if self.k_norm and self.norm_by_head else None,
            norm_eps=self.q_norm.eps if self.q_norm else 0.0,
            norm_weight_offset=self.q_norm.weight_offset if self.q_norm else 0.0,
            k_scales=cache.k_scales,
            v_scales=cache.v_scales,
        )
        out = paged_attention(
            q,
            cache.k,
            cache.v,
            inputs.attention,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            k_scales=cache.k_scales,
            v_scales=cache.v_scales,
            sinks=self.sinks,
        )
        return self.o(out.flatten(1))

    def _norm_projections(self, qkv: Tensor) -> None:
        """Norm queries and keys over all heads at once, in place."""
        end_of_q = self.num_heads * self.head_dim
        end_of_k = end_of_q + self.num_kv_heads * self.head_dim
        for norm, columns in ((self.q_norm, slice(0, end_of_q)), (self.k_norm, slice(end_of_q, end_of_k))):
            if norm is not None:
                qkv[:, columns] = norm(qkv[:, columns].contiguous())
