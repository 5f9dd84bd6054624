"""Shortcut-connected mixture-of-experts layers for Megatron-Core: the all-to-all runs while the dense ops compute.

Reading order: ``layers/group.py`` (how one group runs), ``contracts.py`` (what the rooms agree on), ``dispatch/`` (how
tokens travel), ``overlap/`` (where the experts run), ``models/`` (how Core's model gets our layers), ``mcore/`` (the
seam to Core). docs/architecture.md draws the rooms.
"""

__version__ = "0.1.0"
