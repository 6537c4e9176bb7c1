"""The network: one decoder for every family, described by its ModelSpec. Knows nothing of requests and files."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import embedding

from llmd.model.attention import Attention
from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import KvCache, LayerCache
from llmd.model.latent_attention import LatentAttention
from llmd.model.layer_sorts import sort_of
from llmd.model.layers import GatedMlp, Linear, RmsNorm, add_and_norm
from llmd.model.moe import Moe
from llmd.model.moe_spec import MoeSpec
from llmd.model.rope import cos_sin_table
from llmd.model.spec import LatentSpec, ModelSpec
from llmd_kernels import DeviceSampling, LayerKind, QuantizedWeight, linear_draw, pack_weight, scale_logits

# the reference gives the latents' norms this one, whatever config.json says of the others
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Attention and MLP, each with a norm before it, after it, or both. A norm that a family lacks is None."""

    attention_norm: RmsNorm | None
    attention: Attention | LatentAttention
    attention_output_norm: RmsNorm | None
    mlp_norm: RmsNorm | None
    mlp: GatedMlp | Moe
    mlp_output_norm: RmsNorm | None
    residual_scale: float

    def __call__(
        self, x: Tensor, residual: Tensor | None, inputs: ModelInputs, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """x: what is still to be added to the residual stream. Returns the same two for the next layer."""
        x, residual = add_and_norm(x, residual, self.attention_norm)
        x = self._output(self.attention(x, inputs, cache), self.attention_output_norm)
        x, residual = add_and_norm(x, residual, self.mlp_norm)
        x = self.mlp(x, inputs.slots) if isinstance(self.mlp, Moe) else self.mlp(x)
        return self._output(x, self.mlp_output_norm), residual

    def _output(self, x: Tensor, norm: RmsNorm | None) -> Tensor:
        if norm is not None:
            x = norm(x)
        return x if self.residual_scale == 1 else x * self.residual_scale


class Decoder:
    """A whole model on one device.

    weights: one tensor for each of `parameters(spec)`, by its name, on one device, of the model's dtype or of float32
    where the parameter says so. They are taken out of the dictionary one by one, so that each is free again once it is
    packed for its product. quantized: those that stay quantised instead.
    max_model_len: the longest context that will be served; positions beyond it have no rotary embedding.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        quantized: Mapping[str, QuantizedWeight] = MappingProxyType({}),
        *,
        max_model_len: int,
    ) -> None:
        self.spec = spec
        self.max_model_len = max_model_len
        self._embedding = weights.pop("embedding")
        ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
        device = self._embedding.device
        tables = {rope: cos_sin_table(rope, max_model_len=max_model_len, device=device) for rope in ropes}
        self._layers = [
            _layer(spec, index, weights, quantized, cos_sin=None if layer.rope is None else tables[layer.rope])
            for index, layer in enumerate(spec.layers)
        ]
        self._norm = RmsNorm(weights.pop("norm"), spec.norm_eps, spec.norm_weight_offset)
        head = pack_weight(self._embedding) if spec.tied_embeddings else _matrix("head", weights, quantized)
        self._head = Linear(head, None)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def layer_kinds(self) -> list[LayerKind]:
        """What attention's work lists must be made for, each once."""
        spec = self.spec
        return list(
            dict.fromkeys(
                LayerKind(spec.num_heads, spec.num_kv_heads, spec.head_dim, layer.window) for layer in spec.layers
            )
        )

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def with_unlike_layers(self) -> "Decoder":
        """The same network with fewer layers, which launches the same kernels: the first, then one of each sort."""
        # the first is like no other: it begins the residual stream
        first, *others = self._layers
        short = copy(self)
        short._layers = [first, *{sort_of(layer): layer for layer in others}.values()]
        return short

    @property
    def can_draw(self) -> bool:
        """Whether `draw` works: the head's weight is plain."""
        return isinstance(self._head.weight, Tensor) and not self._head.weight.is_mkldnn

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs, kv: KvCache) -> Tensor:
        """Run one step: write its tokens' keys and values → logits [num_logits, vocab_size] float32."""
        return self.logits(self.hidden(inputs, kv))

    @torch.inference_mode()
    def hidden(self, inputs: ModelInputs, kv: KvCache) -> Tensor:
        """Run one step up to the last norm → what the head reads, [num_logits, hidden_size]."""
        x = embedding(inputs.token_ids, self._embedding)
        if self.spec.embedding_scale != 1:
            # the scale in the weights' dtype: Gemma was trained with the rounded one
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype)
        residual = None
        for layer, cache in zip(self._layers, kv.layers, strict=True):
            x, residual = layer(x, residual, inputs, cache)
        x, residual = x[inputs.logit_rows], residual[inputs.logit_rows] if residual is not None else None
        return add_and_norm(x, residual, self._norm)[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_logits, hidden_size] → logits [num_logits, vocab_size] float32."""
        return scale_logits(self._head(hidden), divisor=self.spec.logit_divisor, soft_cap=self.spec.logit_soft_cap)

    @torch.inference_mode()
    def draw(self, hidden: Tensor, sampling: DeviceSampling) -> Tensor:
        """hidden [num_logits, hidden_size] → a token each, [num_logits] int64: greedy or by temperature alone.

        Bitwise the tokens that `sample_on_device` draws from `logits`, which are not written here. sampling: its first
        rows count.
        """
        weight, rows = self._head.weight, slice(len(hidden))
        assert isinstance(weight, Tensor), "see can_draw"
        return linear_draw(
            hidden,
            weight,
            sampling.temperatures[rows],
            seeds=sampling.seeds[rows],
            choices=sampling.choices[rows],
            positions=sampling.positions[rows],
            divisor=self.spec.logit_divisor,
            soft_cap=self.spec.logit_soft_cap,
        )


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer, or of a part of it, as the things that they belong to. Each can be taken once."""

    prefix: str
    weights: dict[str, Tensor]
    quantized: Mapping[str, QuantizedWeight]
    spec: ModelSpec

    def part(self, name: str) -> "LayerWeights":
        return replace(self, prefix=f"{self.prefix}{name}.")

    def optional(self, name: str) -> Tensor | None:
        return self.weights.pop(self.prefix + name, None)

    def tensor(self, name: str) -> Tensor:
        return self.weights.pop(self.prefix + name)

    def stack(self, name: str) -> Tensor | QuantizedWeight:
        """All experts' matrices, which products read as they are."""
        name = self.prefix + name
        return self.quantized[name] if name in self.quantized else self.weights.pop(name)

    def linear(self, name: str) -> Linear:
        weight = _matrix(f"{self.prefix}{name}.weight", self.weights, self.quantized)
        return Linear(weight, self.optional(f"{name}.bias"))

    def optional_norm(self, name: str) -> RmsNorm | None:
        weight = self.optional(name)
        return None if weight is None else RmsNorm(weight, self.spec.norm_eps, self.spec.norm_weight_offset)

    def mlp(self) -> GatedMlp:
        return GatedMlp(gate_up=self.linear("gate_up"), down=self.linear("down"), activation=self.spec.activation)


def _layer(
    spec: ModelSpec,
    index: int,
    weights: dict[str, Tensor],
    quantized: Mapping[str, QuantizedWeight],
    *,
    cos_sin: Tensor | None,
) -> DecoderLayer:
    """The layer's parts around its weights."""
    here = LayerWeights(f"layers.{index}.", weights, quantized, spec)
    moe = spec.layers[index].moe
    return DecoderLayer(
        attention_norm=here.optional_norm("attention_norm"),
        attention=_latent_attention(spec, spec.latent, here, cos_sin)
        if spec.latent
        else _attention(spec, index, here, cos_sin),
        attention_output_norm=here.optional_norm("attention_output_norm"),
        mlp_norm=here.optional_norm("mlp_norm"),
        mlp=here.mlp() if moe is None else _moe(moe, here),
        mlp_output_norm=here.optional_norm("mlp_output_norm"),
        residual_scale=spec.residual_scale,
    )


def _attention(spec: ModelSpec, index: int, here: LayerWeights, cos_sin: Tensor | None) -> Attention:
    return Attention(
        qkv=here.linear("qkv"),
        o=here.linear("o"),
        q_norm=here.optional_norm("q_norm"),
        k_norm=here.optional_norm("k_norm"),
        norm_by_head=spec.qk_norm == "head",
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        cos_sin=cos_sin,
        scale=spec.attention_scale,
        window=spec.layers[index].window,
        soft_cap=spec.attention_soft_cap,
        sinks=here.optional("sinks"),
        rope_interleaved=spec.rope_interleaved,
    )


def _latent_attention(
    spec: ModelSpec, latent: LatentSpec, here: LayerWeights, cos_sin: Tensor | None
) -> LatentAttention:
    def norm(name: str) -> RmsNorm:
        return RmsNorm(here.tensor(name), LATENT_NORM_EPS, 0.0)

    return LatentAttention(
        spec=latent,
        q_a=None if latent.q_rank is None else here.linear("q_a"),
        q_a_norm=None if latent.q_rank is None else norm("q_a_norm"),
        q=here.linear("q"),
        kv_a=here.linear("kv_a"),
        kv_a_norm=norm("kv_a_norm"),
        kv_b=here.linear("kv_b"),
        o=here.linear("o"),
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        cos_sin=cos_sin,
        rope_interleaved=spec.rope_interleaved,
        scale=spec.attention_scale,
    )


def _moe(moe: MoeSpec, here: LayerWeights) -> Moe:
    return Moe(
        spec=moe,
        router=here.linear("router"),
        choice_bias=here.optional("choice_bias"),
        gate_up=here.stack("experts.gate_up.weight"),
        gate_up_bias=here.optional("experts.gate_up.bias"),
        down=here.stack("experts.down.weight"),
        down_bias=here.optional("experts.down.bias"),
        shared=here.part("shared").mlp() if moe.shared_size else None,
        shared_gate=here.linear("shared_gate") if moe.shared_gate else None,
    )


def _matrix(
    name: str, weights: dict[str, Tensor], quantized: Mapping[str, QuantizedWeight]
) -> Tensor | QuantizedWeight:
    """A weight as its product reads it."""
    return quantized[name] if name in quantized else pack_weight(weights.pop(name))
