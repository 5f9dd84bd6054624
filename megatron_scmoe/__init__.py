"""Shortcut-connected mixture-of-experts layers for NVIDIA Megatron-Core.

Reading order: ``layer.py`` (how one group runs), ``dispatch.py`` (the two halves of a collective), ``config.py``
(what a user can set), ``specs.py`` and ``model.py`` (how Core's model gets our layers), ``mcore.py`` (the seam to
Core).
"""

__version__ = "0.1.0"
