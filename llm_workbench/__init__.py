"""A workbook about open LLMs that one can read, run, teach from and import."""
__version__ = "0.1.0"

# Heavy libraries load when used: the names below import their module on first access (PEP 562).
_LAZY = {
    "load": "lobby",
    "LM": "inference.generation",
    "Decoder": "families.loading",
    "ModelConfig": "architecture.layers",
    "errors": "errors",
}


def __getattr__(name):
    from importlib import import_module
    if name not in _LAZY: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LAZY[name]}")
    return module if _LAZY[name].rpartition(".")[2] == name else getattr(module, name)


def __dir__(): return sorted([*globals(), *_LAZY])
