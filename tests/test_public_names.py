"""What is public: seen by editors, documented, and free of what a fit does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tf_gsnr

INIT = Path(tf_gsnr.__file__)


def test_editors_see_what_is_there():
    static = {}
    for node in ast.parse(INIT.read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for one in node.body:
                static |= {alias.asname: one.module for alias in one.names}
    assert static == tf_gsnr._HOMES
    assert (INIT.parent / "py.typed").exists()


@pytest.mark.parametrize("name", sorted(tf_gsnr._HOMES))
def test_documented(name):
    value = getattr(tf_gsnr, name)
    assert value.__doc__ and len(value.__doc__) > 40


def test_unknown_name():
    with pytest.raises(AttributeError, match="gsnr"):
        tf_gsnr.no_such_name  # noqa: B018


def test_a_fit_imports_neither_data_sets_nor_figures():
    def imported(code):
        code = f"import sys, keras, tensorflow; before = set(sys.modules); {code}; "
        code += "print(*set(sys.modules) - before)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return set(done.stdout.split())

    names = "import tf_gsnr; tf_gsnr.GSNRModel, tf_gsnr.gradient_moments, tf_gsnr.GSNRCallback"
    found = imported(names)
    assert "tf_gsnr.training.model" in found
    assert not {"tensorflow_datasets", "matplotlib", "tf_gsnr.plots", "tf_gsnr.data"} & found
