"""`quantization_config` of config.json → QuantizationSpec, one function a method. No tensors, no family by name.

What would change the weights and is not known is refused by field and value. What concerns activations and caches is
accepted without effect: weights are dequantised exactly and everything else stays in 16 bits or more (decision 0007).
Sources: AutoAWQ's and GPTQModel's READMEs, https://huggingface.co/docs/transformers/quantization,
https://github.com/vllm-project/compressed-tensors.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from llmd.model.config_fields import ConfigFields
from llmd.model.quantization import Layout, ModulePattern, QuantizationRule, QuantizationSpec, WeightScheme

EVERYTHING = (ModulePattern("*"),)
# Linear layers beside the large ones: only compressed-tensors, which names every exception, may quantise them.
ROUTERS = ("gate", "shared_expert_gate", "router")


def parse_quantization(
    fields: ConfigFields, *, head: str, prefixes: tuple[tuple[str, str], ...]
) -> QuantizationSpec | None:
    """What `quantization_config` says; None where there is none.

    head: the output head's name. prefixes: `Family.prefixes`. Raises UnsupportedModel, naming field and value.
    """
    name = "quantization_config"
    if fields.value(name) is None:
        # what compressed-tensors called it before transformers knew it
        name = "compression_config"
    config = fields.value(name)
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise fields.unsupported(f"`{name}` in config.json must be an object, not {config!r}")
    inner = ConfigFields(f"{fields.architecture}, {name}", config, {})
    method = inner.value("quant_method")
    if method not in METHODS:
        raise inner.unsupported(f"`quant_method` {method!r} is not supported; supported: {', '.join(METHODS)}")
    return QuantizationSpec(method=method, rules=METHODS[method](inner, head), prefixes=prefixes)


def _awq(fields: ConfigFields, head: str) -> tuple[QuantizationRule, ...]:
    _choice(fields, "bits", (4,), default=fields.value("w_bit"))
    _choice(fields, "version", ("gemm",), default=fields.value("format") or "gemm")
    if fields.value("backend") == "llm-awq":
        raise fields.unsupported("`backend` 'llm-awq' is not supported: its layout is not that of AutoAWQ's gemm")
    group_size = _group_size(fields, "q_group_size" if fields.value("group_size") is None else "group_size")
    # the layout has zero points even where `zero_point` is false; they are read as they are
    scheme = WeightScheme(layout="awq", bits=4, block=(1, group_size), symmetric=False)
    return _all_but((*_names(fields, "modules_to_not_convert"), head, *ROUTERS), scheme)


def _gptq(fields: ConfigFields, head: str) -> tuple[QuantizationRule, ...]:
    if fields.value("is_marlin_format"):
        raise fields.unsupported("`is_marlin_format` is not supported: the weights are laid out for one GPU kernel")
    # in `lm_head: true` the method quantises the head too, whatever it is called here
    unconverted = (*_names(fields, "modules_to_not_convert"), *ROUTERS, *(() if fields.flag("lm_head") else (head,)))
    *exceptions, everything = _all_but(unconverted, _gptq_scheme(fields))
    listed = _names(fields, "modules_in_block_to_quantize")
    if listed:
        everything = QuantizationRule(_patterns(fields, (*listed, head)), everything.scheme)
    return (*exceptions, *_gptq_overrides(fields), everything)


def _gptq_scheme(fields: ConfigFields) -> WeightScheme:
    stored = _choice(fields, "checkpoint_format", ("gptq", "gptq_v2"), default=fields.value("format") or "gptq")
    group_size = _group_size(fields, "group_size")
    return WeightScheme(
        layout="gptq" if stored == "gptq" else "gptq_v2",
        bits=_bits(fields, "bits"),
        block=(1, group_size),
        symmetric=fields.value("sym") is None or fields.flag("sym"),
        # where all inputs are one group there is no order
        shuffled=fields.flag("desc_act") and group_size is not None,
    )


def _gptq_overrides(fields: ConfigFields) -> list[QuantizationRule]:
    """GPTQModel's `dynamic`: "-:regex" = not quantised; "+:regex" or "regex" = quantised with other fields."""
    dynamic = fields.value("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(changes, Mapping) for changes in dynamic.values()):
        raise fields.unsupported(f"`dynamic` in config.json must be an object of objects, not {dynamic!r}")
    rules = []
    for key, changes in dynamic.items():
        patterns = _patterns(fields, ["re:" + key.removeprefix("-:").removeprefix("+:")])
        scheme = None if key.startswith("-:") else _gptq_scheme(fields.changed(changes))
        rules.append(QuantizationRule(patterns, scheme))
    return rules


def _float8(fields: ConfigFields, head: str) -> tuple[QuantizationRule, ...]:
    _choice(fields, "activation_scheme", ("dynamic", "static"), default="dynamic")
    _choice(fields, "fmt", ("e4m3",), default="e4m3")
    _choice(fields, "expert_dtype", ("fp8",), default="fp8")
    if fields.value("modules_to_convert"):
        raise fields.unsupported("`modules_to_convert` is not supported: only linear layers may be quantised")
    scheme = WeightScheme(layout="float8", bits=8, block=_block(fields, "weight_block_size") or (None, None))
    unconverted = (*_names(fields, "modules_to_not_convert"), *_names(fields, "ignored_layers"))
    return _all_but((*unconverted, head, *ROUTERS), scheme)


def _fbgemm_float8(fields: ConfigFields, head: str) -> tuple[QuantizationRule, ...]:
    scheme = WeightScheme(layout="float8", bits=8, block=(1, None))
    return _all_but((*_names(fields, "modules_to_not_convert"), head, *ROUTERS), scheme)


def _compressed_tensors(fields: ConfigFields, _head: str) -> tuple[QuantizationRule, ...]:
    _choice(fields, "quantization_status", ("compressed",), default="compressed")
    sparsity = fields.value("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise fields.unsupported(f"`sparsity_config` with the format {sparsity['format']!r} is not supported")
    if fields.value("transform_config"):
        raise fields.unsupported("`transform_config` is not supported: the model would need rotated activations")
    groups = fields.value("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.unsupported("`config_groups` in config.json must be an object with at least one group")
    # a group without weights is about activations or the KV cache
    rules = [
        _compressed_group(fields, name, group)
        for name, group in groups.items()
        if not isinstance(group, Mapping) or group.get("weights") is not None
    ]
    ignored = _names(fields, "ignore")
    return (QuantizationRule(_patterns(fields, ignored), None), *rules)


def _compressed_group(fields: ConfigFields, name: str, group: Any) -> QuantizationRule:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise fields.unsupported(f"`config_groups.{name}` in config.json must be an object with an object `weights`")
    own = ConfigFields(f"{fields.architecture}.config_groups.{name}", group, {"format": fields.value("format")})
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    stored = _choice(own, "format", formats)
    weights = ConfigFields(f"{own.architecture}.weights", group["weights"], {})
    # "Linear" is a class of modules; all that may be quantised here are of it
    targets = ["*" if target == "Linear" else target for target in _names(own, "targets")]
    return QuantizationRule(_patterns(own, targets), _compressed_scheme(weights, stored))


def _compressed_scheme(fields: ConfigFields, stored: str) -> WeightScheme:
    kind = _choice(fields, "type", ("int", "float"), default="int")
    bits = _bits(fields, "num_bits")
    layouts: dict[tuple[str, str, int], Layout] = {
        ("pack-quantized", "int", 4): "packed",
        ("pack-quantized", "int", 8): "packed",
        ("int-quantized", "int", 8): "int8",
        ("naive-quantized", "int", 8): "int8",
        ("float-quantized", "float", 8): "float8",
        ("naive-quantized", "float", 8): "float8",
    }
    layout = layouts.get((stored, kind, bits))
    if layout is None:
        raise fields.unsupported(f"`type` {kind!r} with `num_bits` {bits} is not supported in the format {stored!r}")
    symmetric = fields.value("symmetric") is None or fields.flag("symmetric")
    if layout == "float8" and not symmetric:
        raise fields.unsupported("`symmetric` false is not supported where `type` is 'float'")
    block = _compressed_block(fields)
    order = _choice(
        fields, "actorder", ("none", "weight", "static", "group", "dynamic", "true", "false"), default="none"
    )
    return WeightScheme(
        layout=layout,
        bits=bits,
        block=block,
        symmetric=symmetric,
        shuffled=order in ("group", "dynamic", "true"),
    )


def _compressed_block(fields: ConfigFields) -> tuple[int | None, int | None]:
    # what compressed-tensors infers of the size of a group where the strategy is left out
    inferred = {None: "tensor", -1: "channel"}.get(fields.optional_integer("group_size"), "group")
    strategy = _choice(fields, "strategy", ("tensor", "channel", "group", "block"), default=inferred)
    if strategy == "group":
        return 1, _group_size(fields, "group_size")
    if strategy == "block":
        block = _block(fields, "block_structure")
        if block is None:
            raise fields.unsupported("config.json has no `block_structure`")
        return block
    return (1 if strategy == "channel" else None), None


METHODS: dict[str, Callable[[ConfigFields, str], tuple[QuantizationRule, ...]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _float8,
    "fbgemm_fp8": _fbgemm_float8,
}


def _all_but(unconverted: tuple[str, ...], scheme: WeightScheme) -> tuple[QuantizationRule, ...]:
    """Everything has the scheme, but what these names stand for is not quantised."""
    return QuantizationRule(tuple(map(ModulePattern, unconverted)), None), QuantizationRule(EVERYTHING, scheme)


def _choice(fields: ConfigFields, name: str, allowed: tuple[Any, ...], *, default: Any = None) -> Any:
    """The field's value, which has to be one of these, without regard to case."""
    value = fields.value(name)
    value = default if value is None else value
    if isinstance(value, bool | str):
        value = str(value).lower()
    if value not in allowed:
        shown = ", ".join(map(str, allowed))
        raise fields.unsupported(f"`{name}` {value!r} in config.json is not supported; supported: {shown}")
    return value


def _bits(fields: ConfigFields, name: str) -> Literal[4, 8]:
    bits: Literal[4, 8] = _choice(fields, name, (4, 8))
    return bits


def _group_size(fields: ConfigFields, name: str) -> int | None:
    """How many inputs share a scale; None = all (-1 in the file)."""
    size = fields.integer(name)
    if size == -1:
        return None
    if size < 8 or size & (size - 1):
        raise fields.unsupported(f"`{name}` {size} in config.json is not supported; supported: -1 and 8, 16, 32, …")
    return size


def _block(fields: ConfigFields, name: str) -> tuple[int, int] | None:
    """Outputs × inputs that share a scale."""
    value = fields.value(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise fields.unsupported(f"`{name}` in config.json must be two whole numbers, not {value!r}")
    return value[0], value[1]


def _names(fields: ConfigFields, name: str) -> tuple[str, ...]:
    """A list of names, or of lists of names; absent and null are none."""
    value = fields.value(name)
    groups = [] if value is None else value
    if isinstance(groups, list):
        names = [name for group in groups for name in (group if isinstance(group, list) else [group])]
        if all(isinstance(name, str) and name for name in names):
            return tuple(names)
    raise fields.unsupported(f"`{name}` in config.json must be a list of names, not {value!r}")


def _patterns(fields: ConfigFields, names: Iterable[str]) -> tuple[ModulePattern, ...]:
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name.removeprefix("re:"))
            except re.error as error:
                raise fields.unsupported(f"the regular expression {name!r} is wrong: {error}") from error
    return tuple(map(ModulePattern, names))
