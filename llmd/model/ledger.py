"""Who gets which part of the memory: weights, activations, KV cache, by arithmetic. Pure: nothing is allocated.

The KV cache gets what the load could use at most, bounded by what is free; limits that do not fit are reduced, and the
ledger says so with the flag that changes it.
"""

from dataclasses import dataclass

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.errors import StartupFailed
from llmd.model.captured_sizes import NOTHING_CAPTURED, CapturedSizes, captured_sizes, graph_bytes
from llmd.model.memory import (
    activation_bytes,
    dequantized_bytes,
    kv_bytes_per_token,
    rope_bytes,
    step_state_bytes,
    weight_bytes,
)
from llmd.model.parallel import FLOAT32_BYTES
from llmd.model.quantized_layouts import has_quantized_kernels
from llmd.model.spec import ModelSpec

GIB = 1 << 30
MIB = 1 << 20

# On a CPU the rest of the machine lives in the same memory: by default at most half of what is free, and no more
# than this, because pages that the cache has once touched do not come back.
_CPU_KV_SHARE = 0.5
_CPU_KV_LIMIT = 4 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """Bytes by use, and the limits that follow."""

    weights: int
    activations: int
    kv_cache: int
    free: int  # left to others
    num_blocks: int
    block_size: int  # tokens
    max_model_len: int
    wanted_model_len: int  # before it was reduced to fit
    captured: CapturedSizes  # steps of a GPU that there is room for as graphs

    def lines(self) -> list[str]:
        """For the operator."""
        num_tokens = self.num_blocks * self.block_size
        free = max(0, self.free)
        lines = [
            f"memory: weights {_size(self.weights)}, KV cache {_size(self.kv_cache)} ({num_tokens:,} tokens), "
            f"activations {_size(self.activations)}, free {_size(free)}; context {self.max_model_len:,} tokens"
        ]
        if self.max_model_len < self.wanted_model_len:
            block_bytes = self.kv_cache // (self.num_blocks + 1)
            enough = (-(-self.wanted_model_len // self.block_size) + 1) * block_bytes
            lines.append(
                f"context reduced from {self.wanted_model_len:,} to {self.max_model_len:,} tokens, which is what the "
                f"KV cache holds; --kv-cache-memory-bytes {-(-enough // MIB)}M would hold all of it"
            )
        if self.free < 0:
            lines.append(
                f"{_size(-self.free)} more than is free: the KV cache stays as large as before the restart, so that "
                "what fitted then still fits"
            )
        return lines


def plan_memory(
    spec: ModelSpec,
    *,
    dtype_bytes: int,
    kv_dtype_bytes: int,
    available_bytes: int,
    on_cpu: bool,
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    num_blocks: int | None = None,
) -> MemoryLedger:
    """Divide `available_bytes`, what is free before anything is loaded.

    `num_blocks` fixes the size of the KV cache, whatever is free.
    Raises StartupFailed, with the numbers and the flags that matter, if not even a short context fits.
    """
    wanted_model_len = _wanted_model_len(spec, model)
    keeps_quantized = has_quantized_kernels(on_cpu=on_cpu, dtype_bytes=dtype_bytes)
    weights = weight_bytes(
        spec,
        dtype_bytes=dtype_bytes,
        head_is_packed=on_cpu and dtype_bytes == FLOAT32_BYTES,
        keeps_quantized=keeps_quantized,
    )
    weights += rope_bytes(spec, max_model_len=wanted_model_len)
    activations = activation_bytes(
        spec,
        max_num_tokens=scheduler.max_num_batched_tokens,
        max_num_logits=scheduler.max_num_seqs,
        dtype_bytes=dtype_bytes,
    )
    if keeps_quantized:
        activations += dequantized_bytes(spec, dtype_bytes=dtype_bytes)
    captured = NOTHING_CAPTURED
    if not on_cpu:
        activations += step_state_bytes(
            spec,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_tokens=scheduler.max_num_batched_tokens,
            max_model_len=wanted_model_len,
            block_size=cache.block_size,
            dtype_bytes=dtype_bytes,
        )
        if not model.enforce_eager:
            captured = captured_sizes(
                spec,
                max_num_seqs=scheduler.max_num_seqs,
                max_num_tokens=scheduler.max_num_batched_tokens,
                dtype_bytes=dtype_bytes,
            )
            activations += graph_bytes(spec, captured, dtype_bytes=dtype_bytes)
    block_bytes = cache.block_size * kv_bytes_per_token(spec, dtype_bytes=kv_dtype_bytes)
    usable = available_bytes if on_cpu else int(available_bytes * cache.memory_utilization)
    left = usable - weights - activations
    if num_blocks is None:
        budget = cache.memory_bytes or (min(int(left * _CPU_KV_SHARE), _CPU_KV_LIMIT) if on_cpu else left)
        # one block is for padding tokens
        num_blocks = min(budget // block_bytes - 1, _useful_blocks(wanted_model_len, cache, scheduler))
        if num_blocks < 1 or (num_blocks + 1) * block_bytes > left:
            raise StartupFailed(_does_not_fit(weights, activations, max(budget, block_bytes), available_bytes, cache))
    kv_cache = (num_blocks + 1) * block_bytes
    return MemoryLedger(
        weights=weights,
        activations=activations,
        kv_cache=kv_cache,
        free=available_bytes - weights - activations - kv_cache,
        num_blocks=num_blocks,
        block_size=cache.block_size,
        max_model_len=min(wanted_model_len, num_blocks * cache.block_size),
        wanted_model_len=wanted_model_len,
        captured=captured,
    )


def _wanted_model_len(spec: ModelSpec, model: ModelConfig) -> int:
    if model.max_model_len is None:
        return spec.max_positions
    if model.max_model_len > spec.max_stretched_positions:
        raise StartupFailed(
            f"--max-model-len {model.max_model_len} is more than the model allows: {spec.max_stretched_positions}"
        )
    return model.max_model_len


def _useful_blocks(max_model_len: int, cache: CacheConfig, scheduler: SchedulerConfig) -> int:
    """More than every sequence at full length could never be used."""
    return scheduler.max_num_seqs * -(-max_model_len // cache.block_size)


def _does_not_fit(weights: int, activations: int, kv_cache: int, available: int, cache: CacheConfig) -> str:
    remedy = "a smaller model, --dtype bfloat16, --kv-cache-dtype fp8 or a smaller --max-num-batched-tokens"
    if cache.memory_bytes is not None:
        remedy = f"a smaller --kv-cache-memory-bytes (it is {cache.memory_bytes}), " + remedy
    return (
        f"the model does not fit into the memory: weights {_size(weights)}, activations {_size(activations)} and a KV "
        f"cache of {_size(kv_cache)} are more than the {_size(available)} that are free. Try {remedy}"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
