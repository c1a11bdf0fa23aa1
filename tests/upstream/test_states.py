"""Without a plan a saved state is stock's, byte for byte: each library reads the other's."""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.native, pytest.mark.upstream]

# Prints a hash of the logits after a prompt and one more token; saves the state in between, or takes it from the file.
RUN = """
import ctypes, hashlib, sys
from llama_cpp import llama_cpp as lc

verb, model, state, type_k, type_v, *tokens = sys.argv[1:]
quiet = lc.llama_log_callback(lambda *_: None)
lc.llama_log_set(quiet, ctypes.c_void_p(0))
params = lc.llama_model_default_params()
params.n_gpu_layers = 0
model = lc.llama_model_load_from_file(model.encode(), params)
params = lc.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED
params.type_k, params.type_v = int(type_k), int(type_v)
ctx = lc.llama_init_from_model(model, params)

def decode(ids):
    array = (lc.llama_token * len(ids))(*ids)
    assert lc.llama_decode(ctx, lc.llama_batch_get_one(array, len(ids))) == 0
    n_vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    return hashlib.sha256(ctypes.string_at(lc.llama_get_logits(ctx), 4 * n_vocab)).hexdigest()

if verb == "save":
    print(decode([int(t) for t in tokens]))
    size = lc.llama_state_get_size(ctx)
    data = (ctypes.c_uint8 * size)()
    assert lc.llama_state_get_data(ctx, data, size) == size
    open(state, "wb").write(data)
else:
    data = open(state, "rb").read()
    assert lc.llama_state_set_data(ctx, (ctypes.c_uint8 * len(data)).from_buffer_copy(data), len(data)) == len(data)
print(decode([77]))
"""


def run(folder, *arguments):
    """The hashes that RUN prints with the library in this folder."""
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("types", [(1, 1), (8, 2)], ids=["f16", "q8_0/q4_0"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "hybrid"])
def test_without_a_plan_states_are_stock(plain_bin, stock_bin, tiny, tmp_path, arch, types):
    model, folders = tiny(arch), {"ours": plain_bin, "stock": stock_bin}
    tokens = range(1, 41)
    logits = {name: run(folder, "save", model, tmp_path / name, *types, *tokens) for name, folder in folders.items()}
    assert logits["ours"] == logits["stock"]
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "stock").read_bytes()
    for reader, writer in (("ours", "stock"), ("stock", "ours")):
        assert run(folders[reader], "load", model, tmp_path / writer, *types) == logits["ours"][1:]
