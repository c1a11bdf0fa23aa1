"""What chats are made of, and objects that another plan makes other: for tests of what a Llama holds."""

from __future__ import annotations

from itertools import islice

import pytest
from running import mixture, prompt, vectors

from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

ARCHS = [
    "gemma2",
    "gemma3",
    "gemma4",
    "gpt_oss",
    "hybrid",
    "mamba",
    "qwen2 with images",
    "llama",
]  # a window of 64 in the first three
every_arch = pytest.mark.parametrize("arch", ARCHS)
N_LONG = 450  # tokens, more than a window's cache of 256 cells holds

START = prompt(4, seed=9)  # what a template begins every chat with
LONG, SHORT, THIRD = ([*START, *prompt(n - 3, seed)[1:]] for n, seed in ((N_LONG, 1), (23, 2), (90, 3)))


VECTORS = tuple(vectors(il) for il in range(4))
PLAN, OTHER_TYPES = Plan(tuple(mixture(4))), Plan((Pair("q5_0", "q5_0"),) * 4)
OTHERS = {
    "other types": {"plan": OTHER_TYPES},
    "no plan": {"plan": False},
    "vectors": {"plan": Plan(PLAN.pairs, k_vectors=VECTORS)},
    "other weights": {"seed": 1},
    "other rope": {"rope_freq_base": 5000.0},
    "no flash attention": {"flash_attn": False},
}


def answer(llm, tokens, n=12):
    """The n likeliest tokens after a prompt."""
    return list(islice(llm.generate(list(tokens), temp=0.0), n))


def text(llm, tokens):
    """The same through what a prompt cache serves."""
    return llm.create_completion(list(tokens), max_tokens=12, temperature=0.0)["choices"][0]["text"]
