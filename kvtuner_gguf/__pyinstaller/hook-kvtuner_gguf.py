"""PyInstaller: the libraries, where native.py looks for them, and the versions that import_hook.py compares."""

from pathlib import Path

from PyInstaller.utils.hooks import collect_dynamic_libs, collect_submodules, copy_metadata

# what llama_cpp loads; llama-server's are of no use without the program, which is no library
libraries = collect_dynamic_libs("kvtuner_gguf", "kvtuner_gguf/lib")
binaries = [(path, to) for path, to in libraries if Path(path).name.removeprefix("lib").startswith(("ggml", "llama."))]
datas = copy_metadata("kvtuner-gguf") + copy_metadata("llama-cpp-python")
# names that are imported when they are asked for; what makes plans comes along only with a program that imports it
hiddenimports = collect_submodules(
    "kvtuner_gguf", filter=lambda name: ".calibrate" not in name and ".tasks" not in name
)
excludedimports = ["kvtuner_gguf.calibrate", "kvtuner_gguf.tasks"]
