"""The operations that have a Triton kernel, and so a proof."""

from tests.kernels.proof.checks import Proof
from tests.kernels.proof.operations import (
    add_rms_norm,
    all_reduce_add_rms_norm,
    experts,
    gated_mul,
    linear,
    linear_draw,
    paged_attention,
    quantized_linear,
    rms_norm,
    rope_kv_write,
    route,
    sample_on_device,
    scale_logits,
    step_inputs,
    token_logprobs,
    top_tokens,
)

PROOFS: tuple[Proof, ...] = tuple(
    module.PROOF
    for module in (
        rms_norm,
        add_rms_norm,
        gated_mul,
        rope_kv_write,
        linear,
        quantized_linear,
        scale_logits,
        linear_draw,
        sample_on_device,
        top_tokens,
        token_logprobs,
        paged_attention,
        route,
        experts,
        all_reduce_add_rms_norm,
        step_inputs,
    )
)
