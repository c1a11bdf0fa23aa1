"""PyInstaller: a frozen program that imports llama_cpp alone runs on our library, too."""

hiddenimports = ["kvtuner_gguf"]
