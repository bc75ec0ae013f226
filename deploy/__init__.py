from pathlib import Path

PRESETS = Path(__file__).parent / "configs"
"""The folder of the configurations that ship; recipes given by name are looked up in it."""
