"""Checkpoints in and out.

``tensors`` says what every format looks like from here, ``plan`` what becomes of each tensor, and accounts for all of
them. ``formats`` is the table of what can become what, ``engine`` does it, ``journal`` continues what was killed.
What cannot be done, with whatever function here, is a ``CheckpointError``, unless a docstring says otherwise.
"""
