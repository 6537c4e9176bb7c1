"""Writes a tiny random Llama-like model folder: real files of every kind, for tests that need a model but no sense.

Knows nothing of llmd: it is written with safetensors, numpy and tokenizers alone, so that it can also be an input to
tests of the loader. The same arguments give the same bytes.

    python scripts/make_tiny_model.py FOLDER [--seed 0]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = np.ndarray[Any, np.dtype[np.float32]]

BEGIN, END, ASSISTANT_START, MESSAGE_END = "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BEGIN, END, ASSISTANT_START, MESSAGE_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 128,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = True,
) -> Path:
    """Write config, float32 weights, byte-level tokenizer, chat template and generation config into `folder`.

    Any text goes through the tokenizer and back unchanged: token id = byte value order of the byte-level alphabet
    (256 ids), then the special tokens, then padding of the vocabulary to 264 ids that no text produces.
    Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    special_ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    vocab_size = -(-tokenizer.get_vocab_size() // 8) * 8
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": special_ids[BEGIN],
        "eos_token_id": special_ids[END],
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "bos_token_id": special_ids[BEGIN],
        "eos_token_id": [special_ids[END], special_ids[MESSAGE_END]],
    }
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "generation_config.json", generation_config)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(random_weights(config, seed=seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def byte_level_tokenizer() -> Tokenizer:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def random_weights(config: dict[str, Any], *, seed: int) -> dict[str, Array]:
    """Every tensor that a Llama of this config has, by its checkpoint name, float32."""
    random = np.random.default_rng(seed)
    hidden: int = config["hidden_size"]
    intermediate: int = config["intermediate_size"]
    q_size: int = config["num_attention_heads"] * config["head_dim"]
    kv_size: int = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> Array:
        return random.normal(0.0, 2.0 / columns**0.5, (rows, columns)).astype(np.float32)

    def norm() -> Array:
        return random.uniform(0.8, 1.2, hidden).astype(np.float32)

    weights = {"model.embed_tokens.weight": random.normal(0.0, 0.5, (config["vocab_size"], hidden)).astype(np.float32)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix(q_size, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv_size, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(kv_size, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, q_size),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.mlp.gate_proj.weight": matrix(intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, intermediate),
        }
    weights["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return weights


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random Llama-like model folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.folder, seed=arguments.seed))


if __name__ == "__main__":
    main()
