"""Shortcut-connected mixture-of-experts layers for NVIDIA Megatron-Core.

Reading order: ``layer.py`` (how one group runs), ``exchange.py`` (the two halves of a collective), ``dispatch.py``
(tokens on their way to the experts and back), ``config.py`` (what a user can set), ``specs.py`` and ``model.py`` (how
Core's model gets our layers), ``mcore/`` (the seam to Core).
"""

__version__ = "0.1.0"
