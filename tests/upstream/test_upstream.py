"""llama.cpp's own tests pass on the patched tree, and without a plan it is stock: tokens, logits, files.

To the bit with stock's attention; with ours, which adds in another order, to rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtuner_gguf import Pair, Plan
from kvtuner_gguf.calibrate.kld import kl_divergence, log_softmax
from kvtuner_gguf.gguf_file import write_plan

pytestmark = [pytest.mark.upstream, pytest.mark.model]

ROOT = Path(__file__).resolve().parents[2]

# greedy tokens and a digest of the last logits, by plain llama_cpp on the library of LLAMA_CPP_LIB_PATH
GREEDY = """
import hashlib, sys
import llama_cpp
types = dict(type_k=int(sys.argv[2]), type_v=int(sys.argv[3])) if len(sys.argv) > 2 else {}
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=2, n_threads_batch=2, seed=1, flash_attn=True,
                      logits_all=True, verbose=False, **types)
tokens = llm.tokenize(b"The history of the printing press begins")
out = []
for token in llm.generate(tokens, temp=0.0):
    out.append(token)
    if len(out) == 100:
        break
digest = hashlib.sha256(llm.scores[: llm.n_tokens].tobytes()).hexdigest()
print(" ".join(map(str, out)), digest)
"""


# logits after each token of a text, with K and V of one type
LOGITS = """
import sys
import llama_cpp, numpy as np
llm = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads=2, n_threads_batch=2,
                      flash_attn=sys.argv[4] == "on", logits_all=True, verbose=False, type_k=int(sys.argv[3]),
                      type_v=int(sys.argv[3]))
llm.eval(llm.tokenize(open(sys.argv[5], "rb").read())[:900])
np.save(sys.argv[2], llm.scores[: llm.n_tokens])
"""


def logits(bin_dir: Path, model: Path, out: Path, type_number: int, flash_attn: str) -> np.ndarray:
    """(n_tokens, n_vocab) log-probabilities after each token of the README."""
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(bin_dir)}
    args = [sys.executable, "-c", LOGITS, str(model), str(out), str(type_number), flash_attn, str(ROOT / "README.md")]
    subprocess.run(args, env=env, capture_output=True, text=True, check=True)
    return log_softmax(np.load(out))


def greedy(bin_dir: Path, model: Path, *types: int) -> str:
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(bin_dir)}
    args = [sys.executable, "-c", GREEDY, str(model), *map(str, types)]
    return subprocess.run(args, env=env, capture_output=True, text=True, check=True).stdout


def run(program: Path, *args: str) -> str:
    result = subprocess.run([str(program), *args], capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize("types", [(), (8, 2)], ids=["f16", "q8_0/q4_0"])
def test_without_a_plan_tokens_and_logits_are_stock(plain_bin, stock_bin, smol, types):
    assert greedy(plain_bin, smol, *types) == greedy(stock_bin, smol, *types)


def test_a_uniform_plan_gives_the_logits_of_stock_with_those_types(plain_bin, stock_bin, smol, tmp_path):
    planned = write_plan(smol, Plan((Pair("q8_0", "q4_0"),) * 30), tmp_path / "planned.gguf")
    assert greedy(plain_bin, planned) == greedy(stock_bin, smol, 8, 2)


def test_stock_loads_a_planned_file_and_ignores_the_plan(stock_bin, smol, tmp_path):
    planned = write_plan(smol, Plan((Pair("q8_0", "q4_0"),) * 30), tmp_path / "planned.gguf")
    assert greedy(stock_bin, planned) == greedy(stock_bin, smol)


def test_our_attention_is_stocks_to_rounding(patched_bin, stock_bin, smol, tmp_path):
    """As close to stock's f16 as stock's two attention kernels are to each other, and no worse than stock with q8_0."""
    stock = logits(stock_bin, smol, tmp_path / "stock.npy", 1, "on")
    floor = kl_divergence(stock, logits(stock_bin, smol, tmp_path / "off.npy", 1, "off")).mean()
    ours = logits(patched_bin, smol, tmp_path / "ours.npy", 1, "on")
    assert kl_divergence(stock, ours).mean() <= 1.5 * floor
    q8_0 = {
        name: logits(folder, smol, tmp_path / f"{name}.npy", 8, "on")
        for name, folder in (("s", stock_bin), ("o", patched_bin))
    }
    assert kl_divergence(stock, q8_0["o"]).mean() <= kl_divergence(stock, q8_0["s"]).mean() + 0.5 * floor


def test_quantize_fns_pass(patched_bin):
    run(patched_bin / "test-quantize-fns")


@pytest.mark.parametrize("plan", [None, Pair("q8_0", "q4_0")], ids=["f16", "planned"])
def test_save_load_state_passes(patched_bin, smol, tmp_path, plan, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = tuple(plan if il % 2 else Pair("f16", "f16") for il in range(30)) if plan else None
    model = write_plan(smol, Plan(pairs), tmp_path / "planned.gguf") if pairs else smol
    run(patched_bin / "test-save-load-state", "-m", str(model), "-fa", "on")


@pytest.mark.parametrize("op", ["FLASH_ATTN_EXT", "SET_ROWS", "CPY", "MUL_MAT", "ROPE", "GET_ROWS"])
def test_backend_ops_pass_on_the_cpu(patched_bin, op):
    """The CPU backend is the reference itself and is left out by default; -b CPU runs it for support and sanity."""
    text = run(patched_bin / "test-backend-ops", "test", "-o", op, "-b", "CPU")
    assert "FAIL" not in text


def test_series_is_its_own_export(tmp_path):
    """A patch that was edited by hand, or an export that was forgotten, would be lost at the next one."""
    source = ROOT / "build" / "tools" / "llama.cpp"
    if not (source / ".git").exists():
        pytest.skip("no source tree yet: the tests above make it")
    copy = tmp_path / "llama.cpp"
    subprocess.run(["git", "clone", "-q", str(source), str(copy)], check=True)
    for script in ("apply", "check"):
        result = subprocess.run(
            [sys.executable, str(ROOT / "patches" / "series"), script, str(copy)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
