"""What PyInstaller must know to freeze a program that uses this package; it asks by an entry point (pyproject.toml)."""

from pathlib import Path


def hook_dirs() -> list[str]:
    """Where the hooks are, for PyInstaller."""
    return [str(Path(__file__).parent)]
