"""config.json as typed fields that remember who read them. Knows no family and no tensor."""

from collections.abc import Mapping
from typing import Any

from llmd.errors import UnsupportedModel

# Fields that change the numbers in some family, and the values with which they change nothing. A family that does not
# read such a field can serve the model only if it has one of these values.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (None, False),
    "attention_bias": (None, False),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "bias": (None, False),
    "clip_qkv": (None,),
    "compression_config": (None,),
    "decoder_sparse_step": (None, 1),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "first_k_dense_replace": (None, 0),
    "full_attn_mod": (None, 1),
    "interpolate_factor": (None, 1),
    "is_encoder_decoder": (None, False),
    "kv_lora_rank": (None, 0),
    "lm_head_bias": (None, False),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mlp_bias": (None, False),
    "mlp_only_layers": (None, []),
    "moe_intermediate_size": (None, 0),
    "moe_layer_freq": (None, 1),
    "moe_num_experts": (None, 0),
    "n_group": (None, 1),
    "n_routed_experts": (None, 0),
    "n_shared_experts": (None, 0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "num_local_experts": (None, 0),
    "qkv_bias": (None, False),
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleave": (None, False),
    "rope_interleaved": (None, False),
    "routed_scaling_factor": (None, 1),
    "scoring_func": (None, "softmax"),
    "shared_expert_intermediate_size": (None, 0),
    "sliding_window": (None,),
    "swiglu_alpha": (None,),
    "swiglu_limit": (None,),
    "topk_method": (None, "greedy"),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
    "use_qk_norm": (None, False),
    "use_sliding_window": (None, False),
}


class ConfigFields:
    """The fields of one config.json, over the defaults of its architecture.

    A field that is absent has the default; one that is null is None, default or not, because null often has a meaning
    of its own (no window, no soft cap). Every getter raises UnsupportedModel where a value has the wrong type.
    """

    def __init__(self, architecture: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self._values = {**defaults, **config}
        self._read: set[str] = set()

    def value(self, name: str) -> Any:
        """The field as it stands, or None."""
        self._read.add(name)
        return self._values.get(name)

    def integer(self, name: str) -> int:
        """A whole number that has to be there."""
        number = self.optional_integer(name)
        if number is None:
            raise self.unsupported(f"config.json has no `{name}`")
        return number

    def optional_integer(self, name: str) -> int | None:
        value = self.value(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self.unsupported(f"`{name}` in config.json must be a whole number, not {value!r}")

    def size(self, name: str) -> int:
        """A whole number ≥ 1 that has to be there."""
        number = self.integer(name)
        if number < 1:
            raise self.unsupported(f"`{name}` in config.json must be at least 1, not {number}")
        return number

    def number(self, name: str) -> float:
        """A number that has to be there."""
        number = self.optional_number(name)
        if number is None:
            raise self.unsupported(f"config.json has no `{name}`")
        return number

    def optional_number(self, name: str) -> float | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self.unsupported(f"`{name}` in config.json must be a number, not {value!r}")

    def flag(self, name: str) -> bool:
        """True or false; absent and null are false."""
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.unsupported(f"`{name}` in config.json must be true or false, not {value!r}")

    def changed(self, changes: Mapping[str, Any]) -> "ConfigFields":
        """The same fields with some of other values."""
        return ConfigFields(self.architecture, changes, self._values)

    def refuse_ignored(self) -> None:
        """Raise UnsupportedModel if a field that changes the numbers was not read and is not neutral."""
        for name, neutral in NEUTRAL_VALUES.items():
            value = self._values.get(name)
            if name not in self._read and value not in neutral:
                shown = value if isinstance(value, bool | int | float | str) else type(value).__name__
                raise self.unsupported(f"`{name}` ({shown}) in config.json is not supported with this architecture")

    def unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.architecture}: {reason}")
