"""LangChain's chat model, as its page shows it: one answer whole, and one as a stream."""

import sys

from langchain_community.chat_models import ChatLlamaCpp

chat = ChatLlamaCpp(model_path=sys.argv[1], n_ctx=512, max_tokens=16, temperature=0, verbose=False)
whole = chat.invoke("Say hello.").content
stream = "".join(part.content for part in chat.stream("Say hello."))
assert whole and whole == stream, (whole, stream)
print(whole)
