"""Checkpoints in and out.

``tensors`` says what every format looks like from here, ``plan`` what becomes of each tensor, and accounts for all of
them. ``formats`` is the table of what can become what, ``engine`` does it, ``journal`` continues what was killed.

What cannot be done is refused by a ``CheckpointError`` everywhere here, unless a docstring says otherwise. Everywhere,
``origin`` is where something was read, for a message; ``infos`` are tensors by name; ``args`` are the arguments that a
Megatron checkpoint saves, and ``complete`` if they have a value for every name that is read.
"""
