"""What one forward pass reads. Knows nothing of requests."""

from dataclasses import dataclass

from torch import Tensor

from llmd_kernels import AttentionBatch


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """All sequences of a step in one row of tokens, cut by `attention.query_starts`.

    On a CPU the row is padded to a multiple of eight tokens, so that no operation ever meets a shape for which its
    library changes its order of summation (contract C3). Padding tokens belong to no sequence and have no slot.
    """

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64: where each token's K and V go: block id · block size + offset; -1 for padding
    attention: AttentionBatch
    logit_rows: Tensor  # [num_logits] int64: rows whose logits are wanted
