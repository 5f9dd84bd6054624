"""The parts of tools/score.py: token ids and texts (``inputs``), windows over them (``windows``), going through them
(``loop``), results (``output``).
"""
