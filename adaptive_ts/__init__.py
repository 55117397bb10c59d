"""Timestep sampling for training diffusion and flow models, in JAX and Flax.

The names are in ``__init__.pyi``; each is imported when it is first used, so that a command's
``--help`` does not wait for JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"
