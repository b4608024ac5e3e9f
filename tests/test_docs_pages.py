"""The pages that are made from the code are up to date, and hold every public name."""

import importlib.util
from pathlib import Path

import pytest

import tf_gsnr

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
make_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_pages)


@pytest.mark.parametrize("file", make_pages.PAGES)
def test_up_to_date(file):
    made = make_pages.PAGES[file]()
    assert (ROOT / file).read_text() == made, "run python docs/make_pages.py"


def test_every_public_name_is_there():
    named = {name for names in make_pages.GROUPS.values() for name in names}
    assert named == set(tf_gsnr._HOMES)
