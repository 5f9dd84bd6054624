"""What `make package` checks of a wheel (`.ci/check_wheel.py`), on wheels that are made by hand."""

from __future__ import annotations

import importlib.util
import zipfile

import pytest
from training import ROOT

SCRIPT = ROOT / ".ci" / "check_wheel.py"


@pytest.fixture
def check_wheel():
    spec = importlib.util.spec_from_file_location("check_wheel", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sub_package_that_is_not_in_the_wheel_is_named(check_wheel, tmp_path):
    names = check_wheel.sources(ROOT)
    with zipfile.ZipFile(tmp_path / "megatron_scmoe-0.whl", "w") as wheel:
        for name in names:
            if "/codec/" not in name:
                wheel.writestr(name, "")
    verdict = check_wheel.main(tmp_path)
    assert verdict.startswith("megatron_scmoe-0.whl lacks ['megatron_scmoe/codec/__init__.py'")
    assert "layers" not in verdict


def test_a_folder_without_a_wheel_is_noticed(check_wheel, tmp_path):
    assert check_wheel.main(tmp_path) == f"{tmp_path} should hold one wheel and has []"
