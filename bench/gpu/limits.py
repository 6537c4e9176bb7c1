"""What Llama-3.1-8B in bfloat16 can reach at most on a device of given peaks: arithmetic, no measurement.

A step reads every weight once and computes with it for every token, whichever takes longer, and then reads the keys
and values of its sequences: attention waits for memory while products wait for arithmetic, one after the other.
"""

from dataclasses import dataclass

from bench.gpu.sizes import WHOLE, Model

BYTES = 2  # of a number


@dataclass(frozen=True, slots=True)
class Peaks:
    bytes_per_second: float  # of a large copy, bytes read and bytes written
    operations_per_second: float  # of a large matrix product in bfloat16


# What one H100 80GB HBM3 did with torch 2.11: a large copy, and a product of 8192 × 8192 × 8192 (798 TFLOP/s).
H100 = Peaks(3.0e12, 800e12)


@dataclass(frozen=True, slots=True)
class Limits:
    peaks: Peaks = H100
    model: Model = WHOLE.model

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        shapes = [shape for name, shape in self.model.linears.items() if name != "lm_head"]
        return self.model.num_layers * sum(inputs * outputs for inputs, outputs in shapes)

    @property
    def head_weights(self) -> int:
        return self.model.hidden * self.model.vocabulary

    @property
    def kv_bytes(self) -> int:
        """Of one token, all layers."""
        return 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim * BYTES

    def decode_step(self, num_seqs: int, context: float) -> float:
        """Seconds of a step in which `num_seqs` sequences of this context compute one token each."""
        weights = self.layer_weights + self.head_weights
        read = weights * BYTES / self.peaks.bytes_per_second
        computed = 2 * weights * num_seqs / self.peaks.operations_per_second
        return max(read, computed) + num_seqs * context * self.kv_bytes / self.peaks.bytes_per_second

    def prefill(self, num_tokens: int) -> float:
        """Seconds until a prompt's first token: all layers for all tokens, the head for the last, causal attention."""
        model = self.model
        attention = 4 * model.num_layers * model.num_heads * model.head_dim * num_tokens * (num_tokens + 1) / 2
        operations = 2 * self.layer_weights * num_tokens + 2 * self.head_weights + attention
        read = (self.layer_weights + self.head_weights) * BYTES / self.peaks.bytes_per_second
        return max(read, operations / self.peaks.operations_per_second)

    def closed_loop(self, concurrency: int, prompt_tokens: int, output_tokens: int) -> float:
        """Output tokens a second of so many clients: all prompts, then all steps, nothing beside one another."""
        steps = output_tokens * self.decode_step(concurrency, prompt_tokens + output_tokens / 2)
        return concurrency * output_tokens / (concurrency * self.prefill(prompt_tokens) + steps)
