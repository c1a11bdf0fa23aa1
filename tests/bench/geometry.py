"""A llama of any size with random weights in Q4_0, to measure time and memory by: what it writes means nothing.

python tests/bench/geometry.py OUT.gguf [--layers 32] [--heads 32] [--heads-kv 8] [--head-dim 128] [--embd 4096]
    [--ff 14336] [--vocab 128256] [--plan k3_64/t2_64,k4_64/t3_64]

By default an 8B, and else as wide as its heads together. --plan adds a plan whose layers have these pairs in turns,
with a basis for each type of groups.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, TokenType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import TOKEN_TYPES, TOKENS
from native.running import vectors

from kvtuner_gguf import Pair, Plan
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.gguf_file import write_plan

BLOCK, BLOCK_BYTES = 32, 18
STD = 4.6  # of the codes -8 to 7


def q4_0(rng: np.random.Generator, n_out: int, n_in: int) -> np.ndarray:
    """A matrix that keeps the variance of what it multiplies, shape (n_out, bytes of a row). Its rows repeat."""
    n_block = min(n_out, 512) * n_in // BLOCK
    blocks = rng.integers(0, 256, (n_block, BLOCK_BYTES), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(1 / (STD * n_in**0.5)).tobytes(), np.uint8)
    rows = blocks.reshape(-1, n_in // BLOCK * BLOCK_BYTES)
    return np.resize(rows, (n_out, rows.shape[1]))


def write(
    path: Path, n_layer: int, n_head: int, n_head_kv: int, head_dim: int, n_embd: int, n_ff: int, n_vocab: int
) -> None:
    rng = np.random.default_rng(0)
    gguf = GGUFWriter(path, "llama")
    gguf.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    gguf.add_context_length(131072)
    gguf.add_embedding_length(n_embd)
    gguf.add_block_count(n_layer)
    gguf.add_feed_forward_length(n_ff)
    gguf.add_head_count(n_head)
    gguf.add_head_count_kv(n_head_kv)
    gguf.add_key_length(head_dim)
    gguf.add_value_length(head_dim)
    gguf.add_rope_dimension_count(head_dim)
    gguf.add_layer_norm_rms_eps(1e-5)
    n_more = n_vocab - len(TOKENS)
    gguf.add_tokenizer_model("llama")
    gguf.add_token_list(TOKENS + [f"<more {i}>" for i in range(n_more)])
    gguf.add_token_scores([0.0] * n_vocab)
    gguf.add_token_types(TOKEN_TYPES + [TokenType.NORMAL] * n_more)
    gguf.add_bos_token_id(1)
    gguf.add_eos_token_id(2)
    gguf.add_key_value("general.name", "random weights", GGUFValueType.STRING)

    def matrix(name: str, n_out: int, n_in: int) -> None:
        gguf.add_tensor(f"{name}.weight", q4_0(rng, n_out, n_in), raw_dtype=GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        gguf.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))

    matrix("token_embd", n_vocab, n_embd)
    norm("output_norm")
    matrix("output", n_vocab, n_embd)
    for il in range(n_layer):
        norm(f"blk.{il}.attn_norm")
        norm(f"blk.{il}.ffn_norm")
        for name, n_out, n_in in (
            ("attn_q", n_head * head_dim, n_embd),
            ("attn_k", n_head_kv * head_dim, n_embd),
            ("attn_v", n_head_kv * head_dim, n_embd),
            ("attn_output", n_embd, n_head * head_dim),
            ("ffn_gate", n_ff, n_embd),
            ("ffn_up", n_ff, n_embd),
            ("ffn_down", n_embd, n_ff),
        ):
            matrix(f"blk.{il}.{name}", n_out, n_in)
    gguf.write_header_to_file()
    gguf.write_kv_data_to_file()
    gguf.write_tensors_to_file()
    gguf.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--embd", type=int, help="[default: heads times their size]")
    parser.add_argument("--ff", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--plan", help="K/V,K/V...: the pairs of the layers, in turns")
    args = parser.parse_args()
    n_embd = args.embd or args.heads * args.head_dim
    write(args.out, args.layers, args.heads, args.heads_kv, args.head_dim, n_embd, args.ff, args.vocab)
    if args.plan:
        pairs = [Pair(*pair.split("/")) for pair in args.plan.split(",")]
        layers = [pairs[il % len(pairs)] for il in range(args.layers)]
        k_vectors = tuple(
            vectors(il, args.heads_kv, args.head_dim, basis=bool(codec(pair.type_k).groups))
            for il, pair in enumerate(layers)
        )
        write_plan(args.out, Plan(tuple(layers), k_vectors=k_vectors))


if __name__ == "__main__":
    main()
