"""Multi-head latent attention (MLA; DeepSeek-AI, arXiv 2405.04434) of one layer, over the ordinary paged cache.

The plain way: keys and values of all heads are computed from their latent once and cached whole, both with the size of
a key, values filled up with zeros. So every attention kernel serves, at a price in memory: of DeepSeek-V2-Lite a token
takes 324 KiB in bfloat16, where the latents and the shared rotated key would be 30 KiB; of DeepSeek-V3 5.7 MiB instead
of 69 KiB. A kernel that attends to latents (queries and values multiplied into them) would change that.

Within a head the rotated entries come first, as `rope_kv_write` wants them; scores do not depend on the order.
"""

from dataclasses import dataclass

from torch import Tensor

from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import LayerCache
from llmd.model.layers import Linear, RmsNorm
from llmd.model.spec import LatentSpec
from llmd_kernels import paged_attention, rope_kv_write


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    spec: LatentSpec
    q_a: Linear | None  # to the queries' latent; None = there is none
    q_a_norm: RmsNorm | None
    q: Linear  # all heads: the entries that do not rotate, then those that do
    kv_a: Linear  # to the latent of keys and values, then the rotated entries of all heads' keys
    kv_a_norm: RmsNorm
    kv_b: Linear  # all heads: the entries of the key that do not rotate, then the value
    o: Linear
    num_heads: int
    head_dim: int  # in the cache
    cos_sin: Tensor | None  # [max_model_len, rope_dim]
    rope_interleaved: bool
    scale: float

    def __call__(self, x: Tensor, inputs: ModelInputs, cache: LayerCache) -> Tensor:
        """[num_tokens, hidden_size] → the same. Writes the tokens' keys and values to their slots."""
        q = rope_kv_write(
            self._heads(x),
            positions=inputs.positions,
            slots=inputs.slots,
            k_cache=cache.k,
            v_cache=cache.v,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            cos_sin=self.cos_sin,
            interleaved=self.rope_interleaved,
            k_scales=cache.k_scales,
            v_scales=cache.v_scales,
        )
        out = paged_attention(
            q, cache.k, cache.v, inputs.attention, scale=self.scale, k_scales=cache.k_scales, v_scales=cache.v_scales
        )
        return self.o(out[:, :, : self.spec.v_dim].flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        """[num_tokens, 3 · num_heads · head_dim]: queries, keys and values in the manner of the other families."""
        spec, num_heads = self.spec, self.num_heads
        q_input = x if self.q_a is None or self.q_a_norm is None else self.q_a_norm(self.q_a(x))
        q = self.q(q_input).view(-1, num_heads, spec.nope_dim + spec.rope_dim)
        kv_a = self.kv_a(x)
        latent, k_rope = kv_a[:, : spec.kv_rank].contiguous(), kv_a[:, spec.kv_rank :]
        kv = self.kv_b(self.kv_a_norm(latent)).view(-1, num_heads, spec.nope_dim + spec.v_dim)
        heads = x.new_zeros(x.shape[0], 3, num_heads, self.head_dim)
        end = spec.rope_dim + spec.nope_dim
        heads[:, 0, :, : spec.rope_dim] = q[:, :, spec.nope_dim :]
        heads[:, 0, :, spec.rope_dim : end] = q[:, :, : spec.nope_dim]
        heads[:, 1, :, : spec.rope_dim] = k_rope[:, None]
        heads[:, 1, :, spec.rope_dim : end] = kv[:, :, : spec.nope_dim]
        heads[:, 2, :, : spec.v_dim] = kv[:, :, spec.nope_dim :]
        return heads.flatten(1)
