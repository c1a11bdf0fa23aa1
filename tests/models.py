"""Tiny GGUF models with random weights, written when a test needs one: one function per cache shape; and a text.

Each file is under 3 MB (tiny_llama up to 4 layers) and depends only on its arguments: same arguments, same bytes.
Matrices are float16, norms are 1.
The text a model makes means nothing; what matters is the shape of its cache, and that its logits depend on that cache.
Tensor names and required keys: llama.cpp src/llama-arch.cpp and src/models/<arch>.cpp.

Every function of a model takes
    seed   of all random tensors
    extra  metadata added at the end, as (key, GGUFValueType, value); a list value goes with GGUFValueType.ARRAY
and returns the path it wrote, replacing any file there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter, LlamaFileType, TokenType

Extra = Iterable[tuple[str, GGUFValueType, Any]]

BOS, EOS, FIRST_BYTE = 1, 2, 3
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
"""<unk>, BOS, EOS, one token per byte, and the space sign: ASCII text of n characters is BOS + n tokens."""
TOKEN_TYPES = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, TokenType.NORMAL]

OUTLIER_CHANNELS = (30, 31, 62, 63)
"""Of a head of 64: the two slowest NEOX rotation pairs, so a bias there stays put at all positions."""

_LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}  # of an architecture whose norms are not RMS norms
_KEY_TYPES = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, list: GGUFValueType.ARRAY}


class _Writer:
    """One model in the making. Tensors are drawn in the order they are added."""

    def __init__(self, path: Path | str, arch: str, seed: int, keys: dict[str, int | float | list]) -> None:
        """Adds `<arch>.<key>` for all keys, and the vocabulary."""
        self.path = Path(path)
        self._rng = np.random.default_rng(seed)
        self._gguf = GGUFWriter(self.path, arch)
        self._gguf.add_file_type(LlamaFileType.MOSTLY_F16)
        for key, value in keys.items():
            self._gguf.add_key_value(f"{arch}.{key}", value, _KEY_TYPES[type(value)])
        self._add_vocab()

    def _add_vocab(self) -> None:
        self._gguf.add_tokenizer_model("llama")
        self._gguf.add_token_list(TOKENS)
        self._gguf.add_token_scores([0.0] * len(TOKENS))
        self._gguf.add_token_types(TOKEN_TYPES)
        self._gguf.add_bos_token_id(BOS)
        self._gguf.add_eos_token_id(EOS)
        self._gguf.add_add_bos_token(True)
        self._gguf.add_add_eos_token(False)
        self._gguf.add_add_space_prefix(False)

    def tensor(self, name: str, values: np.ndarray) -> None:
        """values in numpy order: the last axis is ggml's ne[0]."""
        self._gguf.add_tensor(name, values)

    def normal(self, *shape: int, std: float = 1.0) -> np.ndarray:
        """float32, mean 0."""
        return self._rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """`name.weight`, shape (..., n_out, n_in), float16: maps unit variance to variance gain**2."""
        self.tensor(f"{name}.weight", self.normal(*shape, std=gain / shape[-1] ** 0.5).astype(np.float16))

    def norm(self, name: str, n: int) -> None:
        """`name.weight`, n ones."""
        self.tensor(f"{name}.weight", np.ones(n, dtype=np.float32))

    def ends(self, n_embd: int, *, embd_std: float = 1.0, norm: str = "output_norm", tied: bool = False) -> None:
        """Token embedding, last norm and output matrix, which is the embedding again if tied. Logits have a std near 2:
        neither flat nor one-hot."""
        self.tensor("token_embd.weight", self.normal(len(TOKENS), n_embd, std=embd_std).astype(np.float16))
        self.norm(norm, n_embd)
        if not tied:
            self.matrix("output", len(TOKENS), n_embd, gain=2.0)

    def attention(
        self, at: str, n_embd: int, n_q: int, n_kv: int, *, qk_gain: float = 1.5, out: str = "attn_output"
    ) -> None:
        """Norm, Q, K, V and output matrix under the prefix `at`; n_q, n_kv: values of one token over all heads."""
        self.norm(f"{at}attn_norm", n_embd)
        self.matrix(f"{at}attn_q", n_q, n_embd, gain=qk_gain)
        self.matrix(f"{at}attn_k", n_kv, n_embd, gain=qk_gain)
        self.matrix(f"{at}attn_v", n_kv, n_embd)
        self.matrix(f"{at}{out}", n_embd, n_q)

    def ffn(self, at: str, n_embd: int, n_ff: int) -> None:
        """Norm and the three matrices of a gated feed-forward block under the prefix `at`."""
        self.norm(f"{at}ffn_norm", n_embd)
        self.matrix(f"{at}ffn_gate", n_ff, n_embd)
        self.matrix(f"{at}ffn_up", n_ff, n_embd)
        self.matrix(f"{at}ffn_down", n_embd, n_ff)

    def plain_layers(self, n_layer: int, n_embd: int, n_ff: int, n_q: int, n_kv: int) -> None:
        """Layers of attention and a feed-forward block, no more."""
        for il in range(n_layer):
            self.attention(f"blk.{il}.", n_embd, n_q, n_kv)
            self.ffn(f"blk.{il}.", n_embd, n_ff)

    def normed_layers(
        self, n_layer: int, n_embd: int, n_ff: int, n_head: int, n_head_kv: int, head_dim: int, *, q_norm: float = 1.0
    ) -> None:
        """The same with norms of each head's Q, whose weights are q_norm, and K, and behind both blocks, as gemma 3 has
        them."""
        for il in range(n_layer):
            at = f"blk.{il}."
            self.attention(at, n_embd, n_head * head_dim, n_head_kv * head_dim)
            self.tensor(f"{at}attn_q_norm.weight", np.full(head_dim, q_norm, dtype=np.float32))
            self.norm(f"{at}attn_k_norm", head_dim)
            self.norm(f"{at}post_attention_norm", n_embd)
            self.ffn(at, n_embd, n_ff)
            self.norm(f"{at}post_ffw_norm", n_embd)

    def save(self, extra: Extra) -> Path:
        for key, value_type, value in extra:
            self._gguf.add_key_value(key, value, value_type)
        self._gguf.write_header_to_file()
        self._gguf.write_kv_data_to_file()
        self._gguf.write_tensors_to_file()
        self._gguf.close()
        return self.path


def _base_keys(*, n_layer: int, n_embd: int, n_ff: int, n_head: int, n_ctx: int = 4096) -> dict[str, Any]:
    """The keys that every architecture reads."""
    return {
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }


def _head_keys(n_head_kv: int, head_dim: int) -> dict[str, Any]:
    """The keys of an architecture whose heads need not divide n_embd."""
    return {
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }


def tiny_llama(
    path: Path | str,
    *,
    n_layer: int = 4,
    head_dim: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ctx: int = 4096,
    rope_dim: int | None = None,
    seed: int = 0,
    extra: Extra = (),
) -> Path:
    """Plain llama: every layer has full attention and its own K and V of n_head_kv * head_dim values.

    rope_dim  rotates only the first rope_dim values of a head. llama.cpp refuses that for arch llama, so the arch is
              then nanbeige: the same keys, tensors, graph and (adjacent pairs) rotation without that check.
    """
    n_embd, n_ff, rope_dim = 128, 192, rope_dim or head_dim
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head, n_ctx=n_ctx)
    keys |= _head_keys(n_head_kv, head_dim) | {"rope.dimension_count": rope_dim}
    w = _Writer(path, "llama" if rope_dim == head_dim else "nanbeige", seed, keys)
    w.ends(n_embd)
    w.plain_layers(n_layer, n_embd, n_ff, n_head * head_dim, n_head_kv * head_dim)
    return w.save(extra)


def tiny_gemma3(path: Path | str, *, n_swa: int = 64, seed: int = 0, extra: Extra = ()) -> Path:
    """gemma3: sliding window of n_swa tokens in layers 0 1 3 4, full attention in layers 2 5; Q and K norms.

    Per layer K and V of 2 heads * 64. The runtime keeps two caches, one per kind of layer. The window's holds n_ctx
    cells too unless swa_full is false, then n_swa + n_ubatch rounded up to a multiple of 256.
    """
    n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim = 6, 128, 128, 4, 2, 64
    keys = (
        _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head)
        | _head_keys(n_head_kv, head_dim)
        | {
            "attention.sliding_window": n_swa,
            "attention.sliding_window_pattern": 3,  # every third layer has full attention; 6 if the key is missing
        }
    )
    w = _Writer(path, "gemma3", seed, keys)
    w.ends(n_embd, embd_std=n_embd**-0.5)  # the graph multiplies by sqrt(n_embd)
    w.normed_layers(n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim)
    return w.save(extra)


def tiny_gemma2(path: Path | str, *, n_swa: int = 64, seed: int = 0, extra: Extra = ()) -> Path:
    """gemma2: the scores of attention go through a soft cap of 2, near enough to bend them; else as tiny_gemma3 without
    norms.

    Sliding window of n_swa tokens in layers 0 2, full attention in layers 1 3. Per layer K and V of 2 heads * 64.
    """
    n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim = 4, 128, 128, 4, 2, 64
    keys = (
        _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head)
        | _head_keys(n_head_kv, head_dim)
        | {
            "attention.sliding_window": n_swa,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
        }
    )
    w = _Writer(path, "gemma2", seed, keys)
    w.ends(n_embd, embd_std=n_embd**-0.5, tied=True)  # the graph multiplies by sqrt(n_embd)
    for il in range(n_layer):
        w.attention(f"blk.{il}.", n_embd, n_head * head_dim, n_head_kv * head_dim)
        w.norm(f"blk.{il}.post_attention_norm", n_embd)
        w.ffn(f"blk.{il}.", n_embd, n_ff)
        w.norm(f"blk.{il}.post_ffw_norm", n_embd)
    return w.save(extra)


def tiny_gemma4(path: Path | str, *, n_swa: int = 64, seed: int = 0, extra: Extra = ()) -> Path:
    """gemma4, whose last layers attend over the K and V of layers before: 3 and 4 over layer 1's, 5 over layer 2's.

    Sliding window of n_swa tokens in layers 0 1 3 4, full attention in layers 2 5; Q and K norms. Layers 0 1 2 have K
    and V of their own, of 2 heads * 64.
    """
    n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim = 6, 128, 128, 4, 2, 64
    keys = (
        _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head)
        | _head_keys(n_head_kv, head_dim)
        | {
            "attention.key_length_swa": head_dim,
            "attention.value_length_swa": head_dim,
            "attention.shared_kv_layers": 3,
            "attention.sliding_window": n_swa,
            "attention.sliding_window_pattern": [True, True, False, True, True, False],
            "embedding_length_per_layer_input": 0,
        }
    )
    w = _Writer(path, "gemma4", seed, keys)
    w.ends(n_embd, embd_std=n_embd**-0.5)  # the graph multiplies by sqrt(n_embd)
    w.tensor("rope_freqs.weight", np.ones(head_dim // 2, dtype=np.float32))
    w.normed_layers(n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim, q_norm=head_dim**-0.5)  # attention scales by 1
    return w.save(extra)


def tiny_gpt_oss(path: Path | str, *, n_swa: int = 64, seed: int = 0, extra: Extra = ()) -> Path:
    """gpt-oss: every head has a sink, a logit that competes with the tokens'; two experts, both used.

    Sliding window of n_swa tokens in layers 0 2, full attention in layers 1 3. Per layer K and V of 2 heads * 64.
    """
    n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim, n_expert = 4, 128, 64, 4, 2, 64, 2
    keys = (
        _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head)
        | _head_keys(n_head_kv, head_dim)
        | {
            "attention.sliding_window": n_swa,
            "rope.dimension_count": head_dim,
            "expert_feed_forward_length": n_ff,
            "expert_count": n_expert,
            "expert_used_count": n_expert,
        }
    )
    w = _Writer(path, "gpt-oss", seed, keys)
    w.ends(n_embd)
    for il in range(n_layer):
        at = f"blk.{il}."
        w.attention(at, n_embd, n_head * head_dim, n_head_kv * head_dim)
        w.tensor(f"{at}attn_output.bias", w.normal(n_embd, std=0.1))
        w.tensor(f"{at}attn_sinks.weight", w.normal(n_head, std=1.0) + np.float32(2.0))
        w.norm(f"{at}post_attention_norm", n_embd)
        w.matrix(f"{at}ffn_gate_inp", n_expert, n_embd)
        w.tensor(f"{at}ffn_gate_inp.bias", w.normal(n_expert, std=0.1))
        for name, n_out, n_in in (("gate", n_ff, n_embd), ("up", n_ff, n_embd), ("down", n_embd, n_ff)):
            w.matrix(f"{at}ffn_{name}_exps", n_expert, n_out, n_in)
            w.tensor(f"{at}ffn_{name}_exps.bias", w.normal(n_expert, n_out, std=0.1))
    return w.save(extra)


def tiny_refact(path: Path | str, *, seed: int = 0, extra: Extra = ()) -> Path:
    """refact: no RoPE, ALiBi in its place; 4 layers, K and V of 2 heads * 64."""
    n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim = 4, 256, 128, 4, 2, 64
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head) | {"attention.head_count_kv": n_head_kv}
    w = _Writer(path, "refact", seed, keys)
    w.ends(n_embd)
    w.plain_layers(n_layer, n_embd, n_ff, n_head * head_dim, n_head_kv * head_dim)
    return w.save(extra)


def tiny_qwen2(
    path: Path | str,
    *,
    k_outlier: float = 0.0,
    outlier_layers: Iterable[int] = (0,),
    images: bool = False,
    seed: int = 0,
    extra: Extra = (),
) -> Path:
    """qwen2: 4 layers, biases on Q, K and V; per layer K and V of 2 heads * 64.

    images          qwen2vl: RoPE of 4 positions, so that an image's tokens stand at one position and cover a square
                    from there
    k_outlier       added to the K bias in OUTLIER_CHANNELS of both heads, sign alternating; other K values have a std
                    near 1.5
    outlier_layers  layers that get it
    """
    n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim = 4, 256, 128, 4, 2, 64
    outlier_layers = frozenset(outlier_layers)
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head) | {"attention.head_count_kv": n_head_kv}
    keys |= {"rope.dimension_sections": [16, 8, 8, 0]} if images else {}
    w = _Writer(path, "qwen2vl" if images else "qwen2", seed, keys)
    w.ends(n_embd)
    for il in range(n_layer):
        w.attention(f"blk.{il}.", n_embd, n_head * head_dim, n_head_kv * head_dim)
        w.ffn(f"blk.{il}.", n_embd, n_ff)
        k_bias = w.normal(n_head_kv, head_dim, std=0.3)
        if il in outlier_layers:
            k_bias[:, OUTLIER_CHANNELS] += np.float32(k_outlier) * np.array([1, -1, 1, -1], dtype=np.float32)
        w.tensor(f"blk.{il}.attn_q.bias", w.normal(n_head * head_dim, std=0.3))
        w.tensor(f"blk.{il}.attn_k.bias", k_bias.reshape(-1))
        w.tensor(f"blk.{il}.attn_v.bias", w.normal(n_head_kv * head_dim, std=0.3))
    return w.save(extra)


def tiny_mla(path: Path | str, *, seed: int = 0, extra: Extra = ()) -> Path:
    """deepseek2 with split attn_k_b and attn_v_b, so multi-head latent attention: 3 layers, no experts.

    The cache holds K only, one row of 128 latent + 64 rotated = 192 values per token and layer. Each of the 4 heads
    decompresses to K of 64 + 64 and V of 64 values.
    """
    n_layer, n_embd, n_ff, n_head, n_rot, n_nope, n_v, n_lora = 3, 128, 256, 4, 64, 64, 64, 128
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head) | {
        "attention.head_count_kv": 1,
        "attention.key_length": n_lora + n_rot,
        "attention.value_length": n_lora,
        "attention.key_length_mla": n_nope + n_rot,
        "attention.value_length_mla": n_v,
        "attention.kv_lora_rank": n_lora,
        "attention.q_lora_rank": 0,  # one attn_q matrix
        "rope.dimension_count": n_rot,
        "leading_dense_block_count": n_layer,  # no layer has experts; the two keys below are read all the same
        "expert_feed_forward_length": n_ff,
        "expert_shared_count": 0,
    }
    w = _Writer(path, "deepseek2", seed, keys)
    w.ends(n_embd)
    for il in range(n_layer):
        at = f"blk.{il}."
        w.norm(f"{at}attn_norm", n_embd)
        w.norm(f"{at}attn_kv_a_norm", n_lora)
        w.matrix(f"{at}attn_q", n_head * (n_nope + n_rot), n_embd, gain=1.5)
        w.matrix(f"{at}attn_kv_a_mqa", n_lora + n_rot, n_embd, gain=1.5)
        w.matrix(f"{at}attn_k_b", n_head, n_lora, n_nope, gain=(n_nope / n_lora) ** 0.5 * 1.5)  # stored transposed
        w.matrix(f"{at}attn_v_b", n_head, n_v, n_lora)
        w.matrix(f"{at}attn_output", n_embd, n_head * n_v)
        w.ffn(at, n_embd, n_ff)
    return w.save(extra)


def tiny_hybrid(path: Path | str, *, seed: int = 0, extra: Extra = ()) -> Path:
    """lfm2: short convolutions (recurrent state, no KV) in layers 0 1 3 5, attention in layers 2 4.

    An attention layer has K and V of 1 head * 64. A window of 3 tokens per convolution.
    """
    n_embd, n_ff, n_head, head_dim, n_window = 128, 256, 2, 64, 3
    n_head_kv = [0, 0, 1, 0, 1, 0]  # 0 marks a recurrent layer
    keys = _base_keys(n_layer=len(n_head_kv), n_embd=n_embd, n_ff=n_ff, n_head=n_head) | {
        "attention.head_count_kv": n_head_kv,
        "shortconv.l_cache": n_window,
    }
    w = _Writer(path, "lfm2", seed, keys)
    w.ends(n_embd, norm="token_embd_norm")  # lfm2's name for the last norm
    for il, n_kv in enumerate(n_head_kv):
        at = f"blk.{il}."
        if n_kv:
            w.attention(at, n_embd, n_embd, n_kv * head_dim)
            w.norm(f"{at}attn_q_norm", head_dim)
            w.norm(f"{at}attn_k_norm", head_dim)
        else:
            w.norm(f"{at}attn_norm", n_embd)
            w.tensor(f"{at}shortconv.conv.weight", w.normal(n_embd, n_window, std=n_window**-0.5))
            w.matrix(f"{at}shortconv.in_proj", 3 * n_embd, n_embd)
            w.matrix(f"{at}shortconv.out_proj", n_embd, n_embd)
        w.ffn(at, n_embd, n_ff)
    return w.save(extra)


def tiny_mamba(path: Path | str, *, seed: int = 0, extra: Extra = ()) -> Path:
    """mamba: 2 layers, each a recurrent state of 256 * 16 values and the last 3 inputs of its convolution; no K, no
    V."""
    n_layer, n_embd, d_conv, d_state, dt_rank = 2, 128, 4, 16, 8
    d_inner = 2 * n_embd
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=0, n_head=0) | {
        "ssm.conv_kernel": d_conv,
        "ssm.inner_size": d_inner,
        "ssm.state_size": d_state,
        "ssm.time_step_rank": dt_rank,
    }
    w = _Writer(path, "mamba", seed, keys)
    w.ends(n_embd)
    for il in range(n_layer):
        at = f"blk.{il}."
        w.norm(f"{at}attn_norm", n_embd)
        w.matrix(f"{at}ssm_in", 2 * d_inner, n_embd)
        w.tensor(f"{at}ssm_conv1d.weight", w.normal(d_inner, d_conv, std=d_conv**-0.5))
        w.tensor(f"{at}ssm_conv1d.bias", w.normal(d_inner, std=0.1))
        w.matrix(f"{at}ssm_x", dt_rank + 2 * d_state, d_inner)
        w.tensor(f"{at}ssm_dt.weight", w.normal(d_inner, dt_rank, std=dt_rank**-0.5))
        # a step of 1/20: the state remembers some tokens
        w.tensor(f"{at}ssm_dt.bias", np.full(d_inner, -3.0, np.float32))
        w.tensor(f"{at}ssm_a", np.tile(-np.arange(1, d_state + 1, dtype=np.float32), (d_inner, 1)))
        w.tensor(f"{at}ssm_d", np.ones(d_inner, np.float32))
        w.matrix(f"{at}ssm_out", n_embd, d_inner)
    return w.save(extra)


def tiny_t5(path: Path | str, *, seed: int = 0, extra: Extra = ()) -> Path:
    """t5: 2 encoder layers without a cache, 2 decoder layers with K and V of 2 heads * 64 for self-attention.

    Cross-attention is computed anew from the encoder's output and is in no cache, so llama_encode comes before
    llama_decode. The position bias keeps llama.cpp off its flash attention kernel even with flash attention on; a
    quantized V then gives NaN.
    """
    n_layer, n_embd, n_ff, n_head, head_dim, n_bucket = 2, 128, 256, 2, 64, 32
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head) | {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.relative_buckets_count": n_bucket,
        "decoder_start_token_id": 0,
    }
    w = _Writer(path, "t5", seed, keys)
    w.ends(n_embd, norm="dec.output_norm")
    w.norm("enc.output_norm", n_embd)
    for il in range(n_layer):
        for at in (f"enc.blk.{il}.", f"dec.blk.{il}.", f"dec.blk.{il}.cross_"):
            # no 1/sqrt(head_dim) on the scores: a smaller gain instead
            w.attention(at, n_embd, n_head * head_dim, n_head * head_dim, qk_gain=0.5, out="attn_o")
        for at in (f"enc.blk.{il}.", f"dec.blk.{il}."):
            w.tensor(f"{at}attn_rel_b.weight", w.normal(n_bucket, n_head))
            w.ffn(at, n_embd, n_ff)
    return w.save(extra)


def tiny_gpt2(path: Path | str, *, n_ctx: int = 128, seed: int = 0, extra: Extra = ()) -> Path:
    """gpt2: no RoPE but a table of n_ctx learned positions, which ends; 2 layers, K and V of 2 heads * 64."""
    n_layer, n_embd, n_ff, n_head = 2, 128, 256, 2
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head, n_ctx=n_ctx)
    w = _Writer(path, "gpt2", seed, keys | _LAYER_NORM)
    w.ends(n_embd)
    w.tensor("output_norm.bias", w.normal(n_embd, std=0.1))
    w.tensor("position_embd.weight", w.normal(n_ctx, n_embd, std=0.5))
    for il in range(n_layer):
        at = f"blk.{il}."
        for name, n_out, n_in in (
            ("attn_qkv", 3 * n_embd, n_embd),
            ("attn_output", n_embd, n_embd),
            ("ffn_up", n_ff, n_embd),
            ("ffn_down", n_embd, n_ff),
        ):
            w.matrix(at + name, n_out, n_in)
            w.tensor(f"{at}{name}.bias", w.normal(n_out, std=0.1))
        for name in ("attn_norm", "ffn_norm"):
            w.norm(at + name, n_embd)
            w.tensor(f"{at}{name}.bias", w.normal(n_embd, std=0.1))
    return w.save(extra)


def tiny_bert(path: Path | str, *, n_ctx: int = 128, seed: int = 0, extra: Extra = ()) -> Path:
    """bert: an encoder, which makes embeddings and has no cache; 2 layers, a table of n_ctx learned positions."""
    n_layer, n_embd, n_ff, n_head = 2, 128, 256, 2
    keys = _base_keys(n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head, n_ctx=n_ctx)
    w = _Writer(path, "bert", seed, keys | _LAYER_NORM)
    w.tensor("token_embd.weight", w.normal(len(TOKENS), n_embd).astype(np.float16))
    w.tensor("position_embd.weight", w.normal(n_ctx, n_embd, std=0.5))
    norms = [
        "token_embd_norm",
        *(f"blk.{il}.{name}" for il in range(n_layer) for name in ("attn_output_norm", "layer_output_norm")),
    ]
    for name in norms:
        w.norm(name, n_embd)
        w.tensor(f"{name}.bias", w.normal(n_embd, std=0.1))
    for il in range(n_layer):
        at = f"blk.{il}."
        for name, n_out, n_in in (("attn_q", n_embd, n_embd), ("attn_k", n_embd, n_embd), ("attn_v", n_embd, n_embd)):
            w.matrix(at + name, n_out, n_in)
        for name, n_out, n_in in (
            ("attn_output", n_embd, n_embd),
            ("ffn_up", n_ff, n_embd),
            ("ffn_down", n_embd, n_ff),
        ):
            w.matrix(at + name, n_out, n_in)
    extra = [
        ("tokenizer.ggml.token_type_count", GGUFValueType.UINT32, 2),
        ("bert.attention.causal", GGUFValueType.BOOL, False),
        *extra,
    ]
    return w.save(extra)


def small_text(path: Path) -> Path:
    """Text of 5000 tokens of the byte vocabulary."""
    words = np.random.default_rng(0).choice(
        ["river", "stone", "cloud", "seven", "light", "house", "green", "walks"], 900
    )
    path.write_text(" ".join(words))
    return path
