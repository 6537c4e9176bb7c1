"""What is measured: shapes of Llama-3.1-8B and loads, whole for a GPU and tiny for a rehearsal. Numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of one layer and the head, and how many layers there are."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every matrix of a step."""
        return {
            "qkv": (self.hidden, self.qkv),
            "o": (self.num_heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
            "lm_head": (self.hidden, self.vocabulary),
        }


@dataclass(frozen=True, slots=True)
class Experts:
    """The sizes of one layer's experts."""

    hidden: int
    intermediate: int
    num_experts: int
    num_chosen: int  # for each token


@dataclass(frozen=True, slots=True)
class Load:
    """What clients ask of the server."""

    prompt_tokens: int
    output_tokens: int
    # (clients at once, requests of each one after the other)
    waves: tuple[tuple[int, int], ...]
    first_token_prompts: tuple[int, ...]  # tokens of prompts that are asked on an idle server, one after the other
    first_token_requests: int  # of each
    others: tuple[str, ...]  # other servers that follow, see server.OTHERS


@dataclass(frozen=True, slots=True)
class Steps:
    """What the runner of a whole model is asked for in this process."""

    model: str  # a built-in configuration; "" for the smallest there can be
    max_model_len: int
    max_num_tokens: int  # of a step
    buckets: tuple[int, ...]  # sequences that decode at once
    num_steps: int  # that are timed
    mixed: tuple[tuple[int, int], ...]  # (sequences that decode, tokens of a prompt beside them)
    # Of requests that must have the same answers in whatever way they are run.
    prompts: tuple[int, ...]  # tokens
    num_answered: int  # tokens
    num_together: int  # requests of a step, with others beside them
    chunk: int  # tokens of a step in which prompts are computed in chunks


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything that a rehearsal makes smaller."""

    model: Model
    block_size: int  # tokens of a KV block
    stream_bytes: int  # of the buffers that bandwidth is measured with
    square: int  # of the largest matrix product
    small_tokens: tuple[int, ...]  # of norms, activation and rope
    linear_tokens: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]  # (sequences, context of each)
    prefill: tuple[int, ...]
    float8_decode: tuple[tuple[int, int], ...]  # likewise, keys and values in float8
    quantized_linears: tuple[str, ...]
    quantized_tokens: tuple[int, ...]
    experts: Experts
    expert_tokens: tuple[int, ...]
    drawn_rows: tuple[int, ...]
    step_sequences: tuple[int, ...]
    step_context: int
    invariant_tokens: tuple[int, ...]  # numbers of rows that `linear` is compared for; the last is the largest
    proofs: tuple[str, ...] | None  # that are checked; None: all
    cases_per_proof: int | None  # None: all
    stress_launches: int
    stress_seconds: float
    sweep_linears: tuple[str, ...]
    sweep_tokens: tuple[int, ...]
    sweep_decode: tuple[tuple[int, int], ...]  # (sequences, context of each)
    sweep_configurations: int | None  # of each kernel, None: all
    min_timed: float  # seconds that a measurement goes on for, once it has `repeats` / 4
    repeats: int
    max_input_sets: int
    steps: Steps
    load: Load


WHOLE = Sizes(
    model=Model(32, 4096, 14336, 32, 8, 128, 128256),
    block_size=16,
    stream_bytes=4 << 30,
    square=8192,
    small_tokens=(1, 64, 256, 8192),
    linear_tokens=(1, 16, 64, 256, 1024, 4096),
    decode=((1, 1024), (8, 1024), (32, 1024), (128, 1024), (256, 1024), (32, 8192)),
    prefill=(1024, 8192),
    float8_decode=((32, 1024), (256, 1024)),
    quantized_linears=("gate_up", "down"),
    quantized_tokens=(1, 64, 1024),
    experts=Experts(2048, 768, 128, 8),
    expert_tokens=(1, 32, 256, 4096),
    drawn_rows=(1, 32, 256),
    step_sequences=(32, 256),
    step_context=1024,
    invariant_tokens=(1, 2, 7, 16, 17, 32, 33, 64, 65, 127, 128, 129, 256, 1000, 4096),
    proofs=None,
    cases_per_proof=None,
    stress_launches=100_000,
    stress_seconds=12.0,
    sweep_linears=("qkv", "o", "gate_up", "down"),
    sweep_tokens=(1024, 256, 64, 2048, 8192, 16),
    # Numbers of sequences that are multiples of 16: others would be compiled again.
    sweep_decode=((32, 1024), (32, 8192), (256, 1024)),
    sweep_configurations=None,
    min_timed=0.02,
    repeats=20,
    max_input_sets=64,
    steps=Steps(
        "llama-3.1-8b",
        max_model_len=2048,
        max_num_tokens=2048,
        buckets=(1, 32, 256, 128, 64, 8),
        num_steps=64,
        mixed=((32, 64), (128, 128)),
        prompts=(700, 333, 90, 1025),
        num_answered=24,
        num_together=32,
        chunk=256,
    ),
    load=Load(
        1024,
        256,
        ((1, 3), (32, 2), (256, 2)),
        first_token_prompts=(128, 1024),
        first_token_requests=9,
        others=("fp8 KV", "qwen3-8b"),
    ),
)

TINY = Sizes(
    model=Model(1, 32, 48, 4, 2, 16, 80),
    block_size=16,
    stream_bytes=1 << 16,
    square=32,
    small_tokens=(2,),
    linear_tokens=(3,),
    decode=((2, 40),),
    prefill=(20,),
    float8_decode=((2, 40),),
    quantized_linears=("o",),
    quantized_tokens=(2,),
    experts=Experts(32, 32, 3, 2),
    expert_tokens=(2,),
    drawn_rows=(2,),
    step_sequences=(2,),
    step_context=40,
    invariant_tokens=(1, 3, 18),
    proofs=("rms_norm", "step_inputs"),
    cases_per_proof=1,
    stress_launches=3,
    stress_seconds=5.0,
    sweep_linears=("o",),
    sweep_tokens=(3,),
    sweep_decode=((2, 40),),
    sweep_configurations=1,
    min_timed=0.0,
    repeats=1,
    max_input_sets=2,
    steps=Steps(
        "",
        max_model_len=64,
        max_num_tokens=16,
        buckets=(2,),
        num_steps=2,
        mixed=((1, 8),),
        prompts=(9,),
        num_answered=3,
        num_together=2,
        chunk=8,
    ),
    load=Load(24, 4, ((1, 1), (3, 1)), first_token_prompts=(24,), first_token_requests=2, others=("fp8 KV",)),
)
