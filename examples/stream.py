"""Answers questions in the terminal, piece by piece; Ctrl-C ends an answer, also in the middle of a long prompt.

python stream.py model.gguf ["a question"]
"""

import signal
import sys
import threading

from kvtuner_gguf import KvtunerError, Llama


def main() -> None:
    model, *questions = sys.argv[1:]
    llm = Llama(model, n_ctx=4096, verbose=False)
    print(f"cache: {llm.kv_bytes / 2**20:.1f} MiB", *llm.plan_notes, sep="\n", file=sys.stderr)
    stop = threading.Event()
    llm.should_stop = stop.is_set  # asked while a prompt is read
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    messages = []
    while questions or sys.stdin.isatty():
        messages.append({"role": "user", "content": questions.pop(0) if questions else input("> ")})
        stop.clear()
        answer = ""
        try:
            for chunk in llm.create_chat_completion(messages, stream=True):
                piece = chunk["choices"][0]["delta"].get("content", "")
                answer += piece
                print(piece, end="", flush=True)
                if stop.is_set():
                    break
        except KvtunerError as error:  # stopped, or the prompt is too long: the message says which
            print(error, file=sys.stderr)
        print()
        messages.append({"role": "assistant", "content": answer})
    llm.close()


if __name__ == "__main__":
    main()
