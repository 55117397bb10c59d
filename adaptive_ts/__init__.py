"""Timestep sampling for training diffusion and flow models, in JAX and Flax.

The names are in ``__init__.pyi``; each is imported when it is first used, so that a command's
``--help`` does not wait for JAX.
"""

import threading
from typing import Any

import lazy_loader

_resolve, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_one_at_a_time = threading.RLock()  # imports begun by several threads can wait for each other
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    with _one_at_a_time:
        return _resolve(name)
