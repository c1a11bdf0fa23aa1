"""Made-up samples of a layer, for the stages that work on captured ones, and how near two large arrays are."""

from __future__ import annotations

import numpy as np

from kvtuner_gguf.calibrate.samples import LayerSample


def make_sample(seed=0, n_head=6, n_head_kv=2, n_q=5, n_kv=9, head_dim_k=64, head_dim_v=64, **fields):
    """Causal, the queries being the last n_q tokens; K and V hold float16 values."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float16).astype(np.float32)

    arrays = {
        "q": normal(n_head, n_q, head_dim_k),
        "k": normal(n_head_kv, n_kv, head_dim_k),
        "v": normal(n_head_kv, n_kv, head_dim_v),
        "mask": np.triu(np.full((n_q, n_kv), -np.inf, np.float32), n_kv - n_q + 1),
    }
    return LayerSample(**{"il": seed, "scale": head_dim_k**-0.5, **arrays, **fields})


def assert_near(got, want, *, rtol=0.0, atol=0.0):
    """No value of got is further from want's than atol + rtol of it; NaN is near nothing. pytest.approx, which looks at
    one value after another, takes milliseconds for a head."""
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, equal_nan=False)
