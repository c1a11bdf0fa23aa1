"""A window that answers: the model runs in a thread, Stop ends an answer.

python window.py model.gguf
"""

import sys
import threading
import tkinter as tk
from tkinter.scrolledtext import ScrolledText

from kvtuner_gguf import KvtunerError, Llama


class Window(tk.Tk):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.title("kvtuner-gguf")
        self.llm, self.stop, self.messages = Llama(model, n_ctx=4096, verbose=False), threading.Event(), []
        self.llm.should_stop = self.stop.is_set
        self.text, self.entry = ScrolledText(self, wrap="word", width=70, height=20), tk.Entry(self)
        self.text.insert("end", f"cache: {self.llm.kv_bytes / 2**20:.1f} MiB at {self.llm.n_ctx()} tokens\n")
        self.button = tk.Button(self, text="Stop", command=self.stop.set, state="disabled")
        self.text.pack(fill="both", expand=True)
        self.entry.pack(side="left", fill="x", expand=True)
        self.button.pack(side="right")
        self.entry.bind("<Return>", self.ask)
        self.entry.focus()

    def ask(self, _event: object) -> None:
        self.messages.append({"role": "user", "content": self.entry.get()})
        self.show(f"\n> {self.entry.get()}\n")
        self.entry.delete(0, "end")
        self.entry["state"], self.button["state"] = "disabled", "normal"
        self.stop.clear()
        threading.Thread(target=self.answer, daemon=True).start()

    def answer(self) -> None:  # not in Tk's thread: what it shows goes there by after()
        said = ""
        try:
            for chunk in self.llm.create_chat_completion(self.messages, stream=True):
                piece = chunk["choices"][0]["delta"].get("content", "")
                said += piece
                self.after(0, self.show, piece)
                if self.stop.is_set():
                    break
        except KvtunerError as error:
            self.after(0, self.show, f"({error})")
        self.messages.append({"role": "assistant", "content": said})
        self.after(0, self.ready)

    def show(self, piece: str) -> None:
        self.text.insert("end", piece)
        self.text.see("end")

    def ready(self) -> None:
        self.entry["state"], self.button["state"] = "normal", "disabled"


if __name__ == "__main__":
    Window(sys.argv[1]).mainloop()
