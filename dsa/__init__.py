"""DeepSeek Sparse Attention: the package under the course.

    import dsa

    model = dsa.from_pretrained("data/sparse")
    model.top_k = 16
    logits, trace = model(tokens, trace=True)

Names are looked up when first used, so that importing `dsa` costs nothing and `python -m dsa.…` runs clean.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsa.checkpoint.load import from_pretrained
    from dsa.checkpoint.save import save_pretrained
    from dsa.generation.generate import generate
    from dsa.model.config import Config
    from dsa.model.transformer import Transformer

__all__ = ["Config", "Transformer", "from_pretrained", "generate", "save_pretrained"]

_HOMES = {
    "Config": "dsa.model.config",
    "Transformer": "dsa.model.transformer",
    "from_pretrained": "dsa.checkpoint.load",
    "generate": "dsa.generation.generate",
    "save_pretrained": "dsa.checkpoint.save",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'dsa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
