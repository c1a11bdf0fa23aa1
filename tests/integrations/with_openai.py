"""OpenAI's own client at a server: one answer whole, and one as a stream."""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key=sys.argv[2] if len(sys.argv) > 2 else "none")
asked = {"model": "any", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "temperature": 0}
client.chat.completions.create(**asked)  # from now on the prompt is in the cache: rounded alike each time
whole = client.chat.completions.create(**asked).choices[0].message.content
parts = client.chat.completions.create(**asked, stream=True)
stream = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
assert whole and whole == stream, (whole, stream)
print(whole)
