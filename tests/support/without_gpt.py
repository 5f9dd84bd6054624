"""A process in which ``megatron.core.models.gpt`` is missing: imports the package and runs the entry script.

Some of Megatron 0.19.2's own files import it before its trainer can start. They are let to, by name; then it is taken
out of what is imported, and from there on nobody finds it. A later Megatron without GPTModel would have changed them.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

HIDDEN = ("megatron.core.models.gpt", "megatron.training.models.gpt")
MEGATRONS_OWN = {
    "megatron.core.models.hybrid.hybrid_layer_specs",
    "megatron.core.post_training.modelopt.gpt.model_specs",
    "megatron.core.post_training.modelopt.hybrid.model_specs",
    "megatron.training.models",
    "megatron.training.training",
}
"""What of Megatron's own imports it on the way to a trained hybrid model."""
OF_GPT = ("megatron_scmoe.models.gpt", "megatron_scmoe.models.specs")
"""What of ours is for the GPT model alone."""


class Missing(MetaPathFinder):
    """Nobody finds what is hidden, but those who are let to.

    Args:
        lets: modules that find it still.
    """

    def __init__(self, lets: set[str]) -> None:
        self.lets = lets

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        asking = importer()
        if is_hidden(name) and asking not in self.lets and not (self.lets and is_hidden(asking)):
            raise ModuleNotFoundError(f"No module named {name!r} for {asking}", name=name)


def is_hidden(name: str) -> bool:
    return any(name == hidden or name.startswith(f"{hidden}.") for hidden in HIDDEN)


def importer() -> str:
    """The module whose import statement is being run."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"].startswith("importlib."):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_globals["__name__"]


def importers() -> set[str]:
    """Modules that are imported and have a line at their top that imports what is hidden."""
    line = re.compile(rf"^from ({'|'.join(map(re.escape, HIDDEN))})\b", re.MULTILINE)
    sources = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return {
        name
        for name, source in sources.items()
        if source and name.startswith("megatron.") and not is_hidden(name) and line.search(Path(source).read_text())
    }


def forget() -> None:
    """Take what is hidden out of what is imported."""
    for name in filter(is_hidden, list(sys.modules)):
        parent, _, child = name.rpartition(".")
        del sys.modules[name]
        if not is_hidden(parent):
            delattr(sys.modules[parent], child)


def import_all() -> None:
    """Import every module of ours; those for the GPT model must not be there."""
    package = importlib.import_module("megatron_scmoe")
    for module in pkgutil.walk_packages(package.__path__, "megatron_scmoe."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if module.name not in OF_GPT:
                raise
            print(f"missing: {module.name}: {error.name}")


def main() -> None:
    missing = Missing(MEGATRONS_OWN)
    sys.meta_path.insert(0, missing)
    import torch

    if not torch.cuda.is_available():
        from megatron_scmoe.cpu import backend

        backend.install()
    importlib.import_module("megatron.training")
    assert importers() == MEGATRONS_OWN, importers()
    missing.lets = set()
    forget()
    import_all()
    import training

    print(training.train(sys.argv[1:]))


if __name__ == "__main__":
    main()
