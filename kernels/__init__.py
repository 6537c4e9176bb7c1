"""The operations that the model and the sampler are made of. Nothing here knows llmd.

One folder an operation: `__init__.py` holds the one public function, which chooses by the tensors' device (PyTorch's
operators, `torch_ops.py`, serve every device that has no kernel of its own; GPUs have `triton_ops.py` where there is
one); `reference.py` is the slow truth, `cost.py` the least that must be moved and computed, README.md what it computes,
from which source, within which limits.
"""

from llmd_kernels.add_rms_norm import add_rms_norm
from llmd_kernels.all_reduce_add_rms_norm import SymmetricMemory, all_reduce_add_rms_norm
from llmd_kernels.experts import experts
from llmd_kernels.gated_mul import gated_mul
from llmd_kernels.linear import linear, pack_weight
from llmd_kernels.linear_draw import linear_draw
from llmd_kernels.paged_attention import (
    AttentionBatch,
    AttentionWork,
    HostLens,
    LayerKind,
    PackedWork,
    WorkLists,
    allocate_work,
    pack_work,
    paged_attention,
)
from llmd_kernels.quantized_linear import (
    Float4Weight,
    Float8Weight,
    IntWeight,
    QuantizedWeight,
    dequantized,
    float4_numbers,
    pack_float4_weight,
    pack_int_weight,
)
from llmd_kernels.rms_norm import rms_norm
from llmd_kernels.rope_kv_write import rope_kv_write
from llmd_kernels.route import route
from llmd_kernels.sample import (
    DeviceSampling,
    PackedSampling,
    RowSampling,
    SampledTokens,
    SamplingBatch,
    SamplingRecords,
    pack_sampling,
    packed_sampling_size,
    plain_sampling,
    sample,
    sample_on_device,
)
from llmd_kernels.scale_logits import scale_logits
from llmd_kernels.step_inputs import (
    BLOCK_TABLES,
    GIVEN_FIELDS,
    TOKEN_IDS,
    NewEntries,
    SequenceTables,
    StepInputs,
    allocate_inputs,
    allocate_tables,
    append_token_ids,
    pack_step,
    step_inputs,
    write_differences,
)
from llmd_kernels.token_logprobs import DeviceLogprobs, TokenLogprobs, token_logprobs, token_logprobs_on_device
from llmd_kernels.top_tokens import top_tokens

__all__ = [
    "BLOCK_TABLES",
    "GIVEN_FIELDS",
    "TOKEN_IDS",
    "AttentionBatch",
    "AttentionWork",
    "DeviceLogprobs",
    "DeviceSampling",
    "Float4Weight",
    "Float8Weight",
    "HostLens",
    "IntWeight",
    "LayerKind",
    "NewEntries",
    "PackedSampling",
    "PackedWork",
    "QuantizedWeight",
    "RowSampling",
    "SampledTokens",
    "SamplingBatch",
    "SamplingRecords",
    "SequenceTables",
    "StepInputs",
    "SymmetricMemory",
    "TokenLogprobs",
    "WorkLists",
    "add_rms_norm",
    "all_reduce_add_rms_norm",
    "allocate_inputs",
    "allocate_tables",
    "allocate_work",
    "append_token_ids",
    "dequantized",
    "experts",
    "float4_numbers",
    "gated_mul",
    "linear",
    "linear_draw",
    "pack_float4_weight",
    "pack_int_weight",
    "pack_sampling",
    "pack_step",
    "pack_weight",
    "pack_work",
    "packed_sampling_size",
    "paged_attention",
    "plain_sampling",
    "rms_norm",
    "rope_kv_write",
    "route",
    "sample",
    "sample_on_device",
    "scale_logits",
    "step_inputs",
    "token_logprobs",
    "token_logprobs_on_device",
    "top_tokens",
    "write_differences",
]
