"""The common model tests of transformers, of exactly the version that is installed, run on other classes.

They are in the source distribution of the package and not in its wheel: pip brings it into a folder, and none of it is
kept here. The tests of generation and of export are not in there: empty mixins stand for these.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
import types
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

_MODULE = "test_modeling_common"
_PACKAGE = "common_tests_of_transformers"
_STAND_INS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def fetched(folder: Path) -> Path:
    """The file of the tests, brought into ``folder`` unless it is there.

    Raises:
        RuntimeError: pip cannot bring it, or the tests are not in it.
    """
    version = transformers.__version__
    file = folder / version / f"{_MODULE}.py"
    if file.is_file():
        return file
    archive = folder / f"transformers-{version}.tar.gz"
    # Without isolation pip takes the setuptools that is installed, and need not bring one.
    words = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", f"transformers=={version}"]
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not archive.is_file():
        raise RuntimeError(f"{' '.join(command)} brings no source of transformers:\n{done.stderr[-2000:]}")
    with tarfile.open(archive) as members:
        try:
            content = members.extractfile(f"transformers-{version}/tests/{_MODULE}.py")
        except KeyError as error:
            raise RuntimeError(
                f"the source distribution of transformers {version} has no tests/{_MODULE}.py"
            ) from error
        assert content is not None
        file.parent.mkdir(exist_ok=True)
        growing = file.with_suffix(".new")
        growing.write_bytes(content.read())
        growing.rename(file)
    return file


def _imported(file: Path) -> types.ModuleType:
    """Their module, in a package of that name with empty mixins where it wants files that are not there."""
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(file.parent)]
    sys.modules[_PACKAGE] = package
    for path, name in _STAND_INS.items():
        folder = types.ModuleType(f"{_PACKAGE}.{path.partition('.')[0]}")
        folder.__path__ = []
        module = types.ModuleType(f"{_PACKAGE}.{path}")
        setattr(module, name, type(name, (), {}))
        sys.modules |= {folder.__name__: folder, module.__name__: module}
    return importlib.import_module(f"{_PACKAGE}.{_MODULE}")


class _Tester:
    """What the tests ask for a configuration and inputs."""

    is_training = True
    batch_size, seq_length = 3, 7

    def __init__(self, common: types.ModuleType, kind: type, values: Mapping[str, Any]) -> None:
        self._common, self._kind, self._values = common, kind, values
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            setattr(self, name, values[name])

    def get_config(self) -> Any:
        return self._kind(**self._values)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = self._common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}


def run(file: Path, folder: Path, home: Path) -> dict[str, tuple[str, str]]:
    """Each test's outcome (passed, skipped or failed), and why, in a process that has transformers alone.

    Args:
        file: what ``fetched`` gave.
        folder: of a model that brings its classes; those for AutoModel and AutoModelForCausalLM are tested.
        home: for what transformers keeps.
    """
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(file), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (found, said) for name, (found, said) in json.loads(done.stdout.splitlines()[-1]).items()}


def _run(file: Path, folder: Path) -> dict[str, tuple[str, str]]:
    values = json.loads((folder / "config.json").read_text())
    places = values.pop("auto_map")
    values = {name: value for name, value in values.items() if name not in ("architectures", "model_type")}
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config, base, causal_lm = (get_class_from_dynamic_module(places[kind], str(folder)) for kind in kinds)
    # By these the tests know what a class is for.
    modeling_auto.MODEL_MAPPING_NAMES[config.model_type] = base.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = causal_lm.__name__
    transformers.AutoConfig.register(config.model_type, config)
    transformers.AutoModel.register(config, base)
    transformers.AutoModelForCausalLM.register(config, causal_lm)
    common = _imported(file)
    attributes = {
        "model_tester": _Tester(common, config, values),
        "all_model_classes": (base, causal_lm),
        "test_all_params_have_gradient": False,  # an expert may have got no token
        "test_can_init_all_missing_weights_before_2023": True,  # the year is not in a file of ours
    }
    case = type("CommonTests", (common.ModelTesterMixin, unittest.TestCase), attributes)
    return {name: _outcome(case(name)) for name in unittest.TestLoader().getTestCaseNames(case)}


def _outcome(test: unittest.TestCase) -> tuple[str, str]:
    result = unittest.TestResult()
    test.run(result)
    if wrong := result.failures + result.errors:
        return "failed", wrong[0][1]
    return ("skipped", result.skipped[0][1]) if result.skipped else ("passed", "")


if __name__ == "__main__":
    print(json.dumps(_run(*map(Path, sys.argv[1:]))))
