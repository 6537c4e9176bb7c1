"""What a model needs of memory, in bytes, from its spec alone. Pure: for `llmd check` and the worker's ledger."""

from llmd.model.parallel import FLOAT32_BYTES, ONE_RANK, Rank, units_of
from llmd.model.parameters import parameters
from llmd.model.quantized_layouts import kept_bytes, kept_parameters
from llmd.model.spec import LayerSpec, ModelSpec

INT32_BYTES, INT64_BYTES = 4, 8
# What attention's programs hand to one another: values (64 MiB at most), and some sums beside them.
ATTENTION_SCRATCH_BYTES = 80 << 20


def num_parameters(spec: ModelSpec) -> int:
    """Of the whole model; an embedding that is the head too counts once."""
    return sum(parameter.num_elements(ONE_RANK) for parameter in parameters(spec))


def weight_bytes(
    spec: ModelSpec,
    *,
    dtype_bytes: int,
    head_is_packed: bool = False,
    keeps_quantized: bool = False,
    rank: Rank = ONE_RANK,
) -> int:
    """The rank's weights; the rope tables are not among them (see `rope_bytes`).

    head_is_packed: an embedding that is the head too is there twice, once in the layout of the matrix product.
    keeps_quantized: quantised weights stay so; otherwise they are dequantised at load and take what others take.
    """
    wanted = parameters(spec)
    kept = kept_parameters(wanted, spec.quantization) if keeps_quantized else {}
    plain = [parameter for parameter in wanted if parameter.name not in kept]
    if head_is_packed and spec.tied_embeddings:
        plain.append(wanted[0])
    quantized = sum(kept_bytes(*pair, rank, dtype_bytes=dtype_bytes) for pair in kept.values())
    return quantized + sum(parameter.num_bytes(rank, dtype_bytes) for parameter in plain)


def dequantized_bytes(spec: ModelSpec, *, dtype_bytes: int, rank: Rank = ONE_RANK) -> int:
    """The largest weight that stays quantised: a product over many tokens dequantises it as a whole for a moment.

    A stack of experts is not among them: its kernels read it as it is, however many tokens there are.
    """
    kept = kept_parameters(parameters(spec), spec.quantization)
    sizes = [parameter.num_elements(rank) for parameter, _ in kept.values() if parameter.num_experts is None]
    return dtype_bytes * max(sizes, default=0)


def rope_bytes(spec: ModelSpec, *, max_model_len: int) -> int:
    """The tables of cosines and sines, float32."""
    ropes = {layer.rope for layer in spec.layers if layer.rope}
    return sum(FLOAT32_BYTES * max_model_len * rope.rotary_dim for rope in ropes)


def kv_bytes_per_token(spec: ModelSpec, *, dtype_bytes: int, rank: Rank = ONE_RANK) -> int:
    """Keys and values of one token in all layers of the rank. Layers with a window keep as much as the others.

    Numbers of one byte have a float32 scale beside each head.
    Latent attention (MLA) keeps expanded keys and values of every head, both of the keys' size: see
    `latent_attention.py`.
    """
    num_kv_heads = len(units_of(rank, spec.num_kv_heads, "attention"))
    head_bytes = spec.head_dim * dtype_bytes + (FLOAT32_BYTES if dtype_bytes == 1 else 0)
    return 2 * len(spec.layers) * num_kv_heads * head_bytes


def activation_bytes(spec: ModelSpec, *, max_num_tokens: int, max_num_logits: int, dtype_bytes: int) -> int:
    """What one step holds at once beside weights and cache: an estimate, rather too high than too low.

    Per token the widest place of a layer: the residual stream, its normed copy and the operation's input, then either
    q, k, v with attention's output or the MLP's two halves with their product, and all of that twice more in float32
    for what operations need inside. Experts: the same for each expert that a token chooses, and what each gives.
    Per logits row: the logits in the model's dtype and three float32 copies for sampling. What attention gathers of
    the context is bounded by its kernel and not in here.
    """
    attention = (3 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if spec.latent is not None:
        # what the projections give, beside the heads that are put together from it
        attention += 2 * spec.num_heads * spec.head_dim + spec.latent.kv_rank + (spec.latent.q_rank or 0)
    widest = 3 * spec.hidden_size + max(attention, *(_mlp_width(spec, layer) for layer in spec.layers))
    per_token = widest * (dtype_bytes + 2 * FLOAT32_BYTES)
    per_logits_row = spec.vocab_size * (dtype_bytes + 3 * FLOAT32_BYTES)
    return max_num_tokens * per_token + max_num_logits * per_logits_row


def _mlp_width(spec: ModelSpec, layer: LayerSpec) -> int:
    if layer.moe is None:
        return 3 * spec.intermediate_size
    moe = layer.moe
    return moe.num_chosen * (3 * moe.expert_size + spec.hidden_size) + 3 * moe.shared_size + 2 * moe.num_experts


def step_state_bytes(
    spec: ModelSpec, *, max_num_seqs: int, max_num_tokens: int, max_model_len: int, block_size: int, dtype_bytes: int
) -> int:
    """What the steps of a GPU keep there: tokens and block tables of the live sequences, and the inputs of a step."""
    tables = max_num_seqs * (max_model_len + -(-max_model_len // block_size)) * INT32_BYTES
    num_inputs = 4 * max_num_tokens + 8 * max_num_seqs
    hidden = max_num_seqs * spec.hidden_size * dtype_bytes
    return tables + num_inputs * INT64_BYTES + hidden + ATTENTION_SCRATCH_BYTES
