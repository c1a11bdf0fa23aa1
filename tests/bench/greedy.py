"""How many greedy tokens are the same with K conditioned and without, on an f16 cache; and by another attention kernel,
without.

python tests/bench/greedy.py MODEL.gguf PLAN.json [--weights bf16] [--tokens 500]

Conditioning changes outputs by rounding alone, and so does the other kernel: both differ where a rounding tips a
near-tie.
--weights: run a copy with such weights, as activations in 8 bits amplify any rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from kvtuner_gguf import Plan
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.runtime import Session

PROMPTS = ("Tell me about the sea.", "Write a Python function that sorts a list.", "Explain photosynthesis.")


def greedy(
    session: Session, k_vectors: Sequence[KVectors], prompt: str, n_tokens: int, flash_attn: bool = True
) -> list[int]:
    """The n_tokens likeliest tokens after the prompt, one by one."""
    tokens = session.tokenize(session.chat_prompt(prompt) or prompt, parse_special=True)
    session.set_plan([Pair("f16", "f16")] * session.n_layer, k_vectors)
    found: list[int] = []
    with session.context(len(tokens) + n_tokens, flash_attn=flash_attn) as ctx:
        logits = ctx.decode([(t, i, 0) for i, t in enumerate(tokens)], [False] * (len(tokens) - 1) + [True])
        while len(found) < n_tokens:
            found.append(int(logits[0].argmax()))
            logits = ctx.decode([(found[-1], len(tokens) + len(found) - 1, 0)], [True])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--weights", help="bf16 or f16 [default: as in the file]")
    parser.add_argument("--tokens", type=int, default=500)
    options = parser.parse_args()
    vectors = Plan.load(options.plan).k_vectors
    print(f"{sum(map(bool, vectors))} layers conditioned")
    with TemporaryDirectory() as tmp:
        model = options.model
        if options.weights:
            model = Path(tmp) / "copy.gguf"
            with Session(options.model) as session:
                session.save_as(model, options.weights)
        with Session(model) as session:
            for prompt in PROMPTS:
                plain, *others = (
                    greedy(session, v, prompt, options.tokens, flash)
                    for v, flash in (((), True), (vectors, True), ((), False))
                )
                same = [next((i for i, (a, b) in enumerate(zip(plain, o)) if a != b), options.tokens) for o in others]
                print(
                    f"of {options.tokens} tokens equal: conditioned {same[0]}, other kernel {same[1]}: {prompt}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
