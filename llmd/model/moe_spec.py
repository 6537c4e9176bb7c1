"""What a mixture of experts is, as numbers, read from config.json. No tensors, no family by name."""

from dataclasses import dataclass

from llmd.model.config_fields import ConfigFields
from llmd.model.family import ExpertActivation, GroupScore, MoeFamily, Scoring
from llmd.model.parallel import MXFP4_BLOCK

NUM_EXPERTS_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """One layer's experts and how a token chooses some of them."""

    num_experts: int
    num_chosen: int  # experts of one token
    expert_size: int  # intermediate
    activation: ExpertActivation
    expert_bias: bool
    scoring: Scoring  # of the router's logits
    renormalize: bool  # the weights of the chosen sum to one
    scale: float  # of the weights, after that
    router_bias: bool
    router_in_float32: bool  # the router's logits are computed in float32, whatever the model's dtype is
    choice_bias: bool  # added to the scores for the choice alone
    num_groups: int  # of experts; 1 = no groups
    num_chosen_groups: int  # groups from which a token may choose
    group_score: GroupScore  # a group's best score, or the sum of its two best
    shared_size: int  # intermediate size of the expert that every token has; 0 = none
    shared_gate: bool  # what the shared expert gives is weighted by a sigmoid
    mxfp4: bool  # the checkpoint has the experts' matrices in MXFP4


def parse_moe(
    fields: ConfigFields, family: MoeFamily, num_layers: int, activation: ExpertActivation
) -> list[MoeSpec | None]:
    """Each layer's experts; None for layers with an ordinary MLP. Raises UnsupportedModel, naming the field.

    activation: the model's, which the family may replace for experts.
    """
    counts = {fields.optional_integer(name) for name in NUM_EXPERTS_FIELDS} - {None}
    if len(counts) != 1:
        raise fields.unsupported(f"config.json must give one number of experts, in one of {NUM_EXPERTS_FIELDS}")
    num_experts = counts.pop() or 0
    num_chosen = fields.size("num_experts_per_tok")
    num_groups, num_chosen_groups = _groups(fields, family)
    if num_experts < 1 or num_experts % num_groups:
        raise fields.unsupported(f"{num_experts} experts in {num_groups} groups cannot be served")
    if not 1 <= num_chosen_groups <= num_groups or num_chosen > num_experts // num_groups * num_chosen_groups:
        raise fields.unsupported(
            f"a token cannot choose {num_chosen} experts (`num_experts_per_tok`) from {num_chosen_groups} of "
            f"{num_groups} groups of {num_experts // num_groups}"
        )
    if family.group_score == "top2" and num_experts // num_groups < 2:
        raise fields.unsupported("groups of one expert have no two best scores (`n_group`)")
    moe = MoeSpec(
        num_experts=num_experts,
        num_chosen=num_chosen,
        expert_size=fields.size(family.expert_size_field),
        activation=family.activation or activation,
        expert_bias=family.expert_bias,
        scoring=family.scoring,
        renormalize=fields.flag("norm_topk_prob") if family.renormalizes is None else family.renormalizes,
        scale=fields.number("routed_scaling_factor") if family.has_scale else 1.0,
        router_bias=family.router_bias,
        router_in_float32=family.router_in_float32,
        choice_bias=family.choice_bias,
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        group_score=family.group_score or "max",
        shared_size=_shared_size(fields, family),
        shared_gate=family.shared_gate,
        mxfp4=_is_mxfp4(fields, family),
    )
    return [moe if has_experts else None for has_experts in family.layers(fields, num_layers)]


def _groups(fields: ConfigFields, family: MoeFamily) -> tuple[int, int]:
    """(number of groups, groups from which a token may choose)."""
    if family.group_score is None:
        return 1, 1
    groups = fields.optional_integer("n_group") or 1, fields.optional_integer("topk_group") or 1
    return (1, 1) if fields.value("topk_method") == "greedy" else groups


def _shared_size(fields: ConfigFields, family: MoeFamily) -> int:
    match family.shared:
        case None:
            return 0
        case "counted":
            return (fields.optional_integer("n_shared_experts") or 0) * fields.size(family.expert_size_field)
        case "sized":
            return fields.size("shared_expert_intermediate_size")


def _is_mxfp4(fields: ConfigFields, family: MoeFamily) -> bool:
    if not family.may_be_mxfp4:
        return False
    quantization = fields.value("quantization_config")
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "mxfp4":
        raise fields.unsupported(f"`quantization_config` in config.json: the method {method!r} is not supported")
    for name in ("hidden_size", family.expert_size_field):
        if fields.size(name) % MXFP4_BLOCK:
            raise fields.unsupported(f"`{name}` ({fields.size(name)}) is no multiple of MXFP4's block, {MXFP4_BLOCK}")
    return True
