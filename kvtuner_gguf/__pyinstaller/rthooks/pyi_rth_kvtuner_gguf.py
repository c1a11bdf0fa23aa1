"""What kvtuner_gguf.pth does where Python is installed, in a frozen program: before any of its code."""

import os

if os.environ.get("KVTUNER_GGUF_AUTO") != "0":
    import kvtuner_gguf  # noqa: F401
