"""LlamaIndex's completion, as its page shows it: one answer whole, and one as a stream."""

import sys

from llama_index.llms.llama_cpp import LlamaCPP

llm = LlamaCPP(model_path=sys.argv[1], context_window=512, max_new_tokens=16, temperature=0.0, verbose=False)
whole = llm.complete("The tide comes in").text
stream = "".join(part.delta for part in llm.stream_complete("The tide comes in"))
assert whole and whole == stream, (whole, stream)
print(whole)
