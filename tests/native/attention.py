"""ggml's attention operator through ctypes, in a process of its own so that any build's library can be loaded, and its
float64 value.

As a program: python attention.py LIB_DIR < cases.json, prints one line of JSON per case: the error of the library's
result.
"""

from __future__ import annotations

import ctypes as c
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import reference

TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20,
         "q2_64": 200, "q2_32": 201, "q3_64": 202, "q3_32": 203, "q6_32": 204,
         "k2_64": 205, "k3_64": 206, "k4_64": 207, "t2_64": 208, "t3_64": 209, "t4_64": 210, "k5_64": 211}  # fmt: skip
FIRST_OF_OURS = 200

DEFAULT = {
    "k": "f16", "v": "f16", "dk": 64, "dv": 64, "n_head_kv": 2, "n_gqa": 3, "n_q": 1, "n_kv": 256, "n_stream": 1,
    "mask": "causal",
    "sinks": False, "softcap": 0.0, "max_bias": 0.0, "v_in_k": False, "room": 0, "n_threads": 2,
    "loud": 0,
}  # fmt: skip


class Ggml:
    """The libraries in a folder."""

    def __init__(self, folder: Path):
        suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
        prefix = "" if sys.platform == "win32" else "lib"
        self.base = c.CDLL(str(folder / f"{prefix}ggml-base.{suffix}"), mode=c.RTLD_GLOBAL)
        self.cpu = c.CDLL(str(folder / f"{prefix}ggml-cpu.{suffix}"), mode=c.RTLD_GLOBAL)
        self.cpu.ggml_cpu_init()

        class Params(c.Structure):
            _fields_ = (("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool))

        class Plan(c.Structure):
            _fields_ = (("work_size", c.c_size_t), ("work_data", c.c_void_p), ("n_threads", c.c_int), ("threadpool",
                        c.c_void_p),
                        ("abort", c.c_void_p), ("abort_data", c.c_void_p), ("use_ref", c.c_bool))  # fmt: skip

        self.params = Params
        p, i64, f32 = c.c_void_p, c.c_int64, c.c_float
        for lib, name, result, arguments in (
            (self.base, "ggml_init", p, [Params]),
            (self.base, "ggml_free", None, [p]),
            (self.base, "ggml_new_tensor_4d", p, [p, c.c_int, i64, i64, i64, i64]),
            (self.base, "ggml_permute", p, [p, p, c.c_int, c.c_int, c.c_int, c.c_int]),
            (self.base, "ggml_view_4d", p, [p, p, i64, i64, i64, i64, c.c_size_t, c.c_size_t, c.c_size_t, c.c_size_t]),
            (self.base, "ggml_get_data", p, [p]),
            (self.base, "ggml_nbytes", c.c_size_t, [p]),
            (self.base, "ggml_row_size", c.c_size_t, [c.c_int, i64]),
            (self.base, "ggml_quantize_chunk", c.c_size_t, [c.c_int, p, p, i64, i64, i64, p]),
            (self.base, "ggml_flash_attn_ext", p, [p, p, p, p, p, f32, f32, f32]),
            (self.base, "ggml_flash_attn_ext_add_sinks", None, [p, p]),
            (self.base, "ggml_new_graph", p, [p]),
            (self.base, "ggml_build_forward_expand", None, [p, p]),
            (self.cpu, "ggml_graph_plan", Plan, [p, c.c_int, p]),
            (self.cpu, "ggml_graph_compute", c.c_int, [p, p]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments

    def quantize(self, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of the rows of x, and the values that they stand for."""
        n = x.shape[-1]
        x = np.ascontiguousarray(x, np.float32)
        data = np.empty((*x.shape[:-1], self.base.ggml_row_size(TYPES[name], n)), np.uint8)
        if name == "f32":
            data[...] = x.view(np.uint8)
            return data, x
        self.base.ggml_quantize_chunk(TYPES[name], x.ctypes.data, data.ctypes.data, 0, x.size // n, n, None)
        if name == "f16":
            return data, data.view(np.float16).astype(np.float32)
        if name == "bf16":
            return data, (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if TYPES[name] >= FIRST_OF_OURS:
            return data, reference.dequantize(name, data.reshape(-1, data.shape[-1])).reshape(x.shape)
        from gguf import GGMLQuantizationType, dequantize

        return data, dequantize(data, GGMLQuantizationType[name.upper()]).astype(np.float32)

    def knows(self, *names: str) -> bool:
        """Whether the libraries have these types: stock's have none of ours."""
        return hasattr(self.cpu, "kvt_attn_ref") or all(TYPES[name] < FIRST_OF_OURS for name in names)


class Graph:
    """A graph of these operators, and what it works with on so many threads."""

    def __init__(self, ggml: Ggml, ctx: int, outs: Sequence[int], n_threads: int):
        self.ggml, self.graph = ggml, ggml.base.ggml_new_graph(ctx)
        for out in outs:
            ggml.base.ggml_build_forward_expand(self.graph, out)
        self.plan = ggml.cpu.ggml_graph_plan(self.graph, n_threads, None)
        self.plan.n_threads = n_threads  # as in a model: some operators alone ask for one
        self.work = (c.c_uint8 * self.plan.work_size)()
        c.memset(self.work, 0xFF, self.plan.work_size)  # NaN, so that nothing is read before it is written
        self.plan.work_data = c.addressof(self.work)

    def run(self) -> None:
        assert self.ggml.cpu.ggml_graph_compute(self.graph, c.addressof(self.plan)) == 0


@dataclass(frozen=True)
class Inputs:
    """What one call of the operator reads.

    q              (n_stream, n_head, n_q, dk) float32
    k v            (n_stream, n_kv, n_head_kv, row bytes) uint8, as llama.cpp's cache has them: the heads of a token
                   beside each other
    mask           (n_stream, 1, n_q, n_kv) float16, or None
    sinks          (n_head,) float32, or None
    k_hat v_hat    (n_stream, n_head_kv, n_kv, head_dim): the values that the bytes stand for
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray | None
    sinks: np.ndarray | None
    k_hat: np.ndarray
    v_hat: np.ndarray

    @classmethod
    def drawn(cls, ggml: Ggml, case: dict, seed: int) -> Inputs:
        """Random ones of a case; the V of one with v_in_k is the front of K's rows. In a loud one Q, and so the scores,
        are that many times as large, and V's values 1 or -1: all of its scales are as large."""
        rng = np.random.default_rng(seed)
        n_head_kv, n_head = case["n_head_kv"], case["n_head_kv"] * case["n_gqa"]
        dk, dv, n_q, n_kv, n_stream = (case[name] for name in ("dk", "dv", "n_q", "n_kv", "n_stream"))
        q = rng.standard_normal((n_stream, n_head, n_q, dk), np.float32) * np.float32(case["loud"] or 1)
        k, k_hat = ggml.quantize(case["k"], rng.standard_normal((n_stream, n_kv, n_head_kv, dk), np.float32))
        if case["v_in_k"]:
            v, v_hat = k, k_hat[..., :dv]
        else:
            x = rng.standard_normal((n_stream, n_kv, n_head_kv, dv), np.float32) + 0.25
            v, v_hat = ggml.quantize(case["v"], np.sign(x) if case["loud"] else x)
        mask = _mask(case, rng).astype(np.float16) if case["mask"] else None
        sinks = rng.uniform(-4, 4, n_head).astype(np.float32) if case["sinks"] else None
        return cls(q, k, v, mask, sinks, k_hat.transpose(0, 2, 1, 3), v_hat.transpose(0, 2, 1, 3))


def _mask(case: dict, rng: np.random.Generator) -> np.ndarray:
    """(n_stream, 1, n_q, n_kv): the last tokens before the room, if there is any, are the queries; "holes": other
    sequences' cells lie between, and one row sees nothing."""
    n_q, n_kv, n_stream = (case[name] for name in ("n_q", "n_kv", "n_stream"))
    distance = np.arange(n_kv)[None, :] - (n_kv - case["room"] - n_q + np.arange(n_q))[:, None]
    mask = np.where(distance > 0, -np.inf, distance if case["max_bias"] else 0.0) * np.ones((n_stream, 1, 1, 1))
    if case["mask"] == "holes":
        mask[
            np.broadcast_to(
                np.repeat(rng.random((n_stream, 1, n_q, -(-n_kv // 50))) < 0.6, 50, -1)[..., :n_kv], mask.shape
            )
        ] = -np.inf
        mask[:, :, -1] = -np.inf
    return mask


class Operator:
    """One case: ggml's graph of it, over random inputs of a seed or given ones."""

    def __init__(self, ggml: Ggml, case: dict, seed: int = 0, inputs: Inputs | None = None):
        self.ggml, self.case = ggml, {**DEFAULT, **case}
        case = self.case
        self.inputs = inputs or Inputs.drawn(ggml, case, seed)
        base, n_head = ggml.base, case["n_head_kv"] * case["n_gqa"]
        dk, dv, n_q, n_kv, n_stream = (case[name] for name in ("dk", "dv", "n_q", "n_kv", "n_stream"))
        rows = n_stream * n_kv * case["n_head_kv"]
        self.ctx = base.ggml_init(
            ggml.params(
                16 * (rows * (dk + dv) + n_stream * n_q * (n_kv + 4 * n_head * (dk + dv))) + (64 << 20), None, False
            )
        )
        assert self.ctx

        def tensor(name: str, *ne: int, data: np.ndarray) -> int:
            t = base.ggml_new_tensor_4d(self.ctx, TYPES[name], *ne)
            data = np.ascontiguousarray(data)
            c.memmove(base.ggml_get_data(t), data.ctypes.data, base.ggml_nbytes(t))
            return t

        def cache(name: str, n: int, data: np.ndarray) -> int:
            return base.ggml_permute(
                self.ctx, tensor(name, n, case["n_head_kv"], n_kv, n_stream, data=data), 0, 2, 1, 3
            )

        q = tensor("f32", dk, n_q, n_head, n_stream, data=self.inputs.q)
        k = cache(case["k"], dk, self.inputs.k)
        if case["v_in_k"]:
            size = base.ggml_row_size(TYPES[case["k"]], dk)
            heads = case["n_head_kv"]
            v = base.ggml_view_4d(self.ctx, k, dv, n_kv, heads, n_stream, heads * size, size, n_kv * heads * size, 0)
        else:
            v = cache(case["v"], dv, self.inputs.v)
        mask = None if self.inputs.mask is None else tensor("f16", n_kv, n_q, 1, n_stream, data=self.inputs.mask)
        self.scale = dk**-0.5
        self.out = base.ggml_flash_attn_ext(self.ctx, q, k, v, mask, self.scale, case["max_bias"], case["softcap"])
        if self.inputs.sinks is not None:
            base.ggml_flash_attn_ext_add_sinks(self.out, tensor("f32", n_head, 1, 1, 1, data=self.inputs.sinks))
        self.run = Graph(ggml, self.ctx, [self.out], case["n_threads"]).run

    def compute(self) -> np.ndarray:
        """(n_stream, n_q, n_head, dv), by the library."""
        self.run()
        return self._out()

    def compute_ref(self) -> np.ndarray:
        """Like compute, by kvt_attn_ref."""
        self.ggml.cpu.kvt_attn_ref(c.c_void_p(self.out))
        return self._out()

    def _out(self) -> np.ndarray:
        case = self.case
        shape = (case["n_stream"], case["n_q"], case["n_head_kv"] * case["n_gqa"], case["dv"])
        data = (c.c_float * int(np.prod(shape))).from_address(self.ggml.base.ggml_get_data(self.out))
        return np.frombuffer(data, np.float32).reshape(shape).copy()

    def exact(self) -> np.ndarray:
        """Like compute, by numpy in float64 on the values that the cache holds."""
        n_gqa, softcap, given = self.case["n_gqa"], self.case["softcap"], self.inputs
        k, v = (np.repeat(x.astype(np.float64), n_gqa, axis=1) for x in (given.k_hat, given.v_hat))
        s = given.q.astype(np.float64) @ k.swapaxes(-1, -2) * self.scale
        if softcap:
            s = softcap * np.tanh(s / softcap)
        if given.mask is not None:
            n_head = s.shape[1]
            n_log2, b, h = 2 ** int(np.log2(n_head)), self.case["max_bias"], np.arange(n_head)
            slope = (
                np.where(h < n_log2, 2.0 ** (-b * (h + 1) / n_log2), 2.0 ** (-b / 2 * (2 * (h - n_log2) + 1) / n_log2))
                if b
                else np.ones(n_head)
            )
            s = s + slope[:, None, None] * given.mask.astype(np.float64)
        sink = np.full(s.shape[1], -np.inf) if given.sinks is None else given.sinks.astype(np.float64)
        sink = sink[None, :, None, None]
        top = np.maximum(s.max(-1, keepdims=True), sink)
        top = np.where(np.isinf(top), 0.0, top)
        p = np.exp(s - top)
        total = p.sum(-1, keepdims=True) + np.exp(sink - top)
        return (np.divide(p, total, out=np.zeros_like(p), where=total > 0) @ v).transpose(0, 2, 1, 3)

    def free(self) -> None:
        self.ggml.base.ggml_free(self.ctx)


def error(x: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over the norm of the exact result; of nothing but masked rows, the norm of x."""
    return float(np.linalg.norm(x - exact) / (np.linalg.norm(exact) or 1.0))


def main() -> None:
    ggml = Ggml(Path(sys.argv[1]))
    for case in json.load(sys.stdin):
        operator = Operator(ggml, case)
        x, exact = operator.compute(), operator.exact()
        ref = error(operator.compute_ref(), exact) if case.get("ref") else None
        print(json.dumps({"error": error(x, exact), "ref": ref, "finite": bool(np.isfinite(x).all())}), flush=True)
        operator.free()


if __name__ == "__main__":
    main()
