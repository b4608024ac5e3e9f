"""ARCHITECTURE.md is true to the code: every file is in it; imports go one way, in no circle."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import tf_gsnr
from tf_gsnr import experiments

PACKAGE = Path(tf_gsnr.__file__).parent
PAGE = PACKAGE.parent / "ARCHITECTURE.md"
# The floors, the lowest first: a file imports of its own floor and of those before.
FLOORS = [
    "moments arrays checks keras_internals progress lookup lock ending",
    "significance",
    "metrics shown records columns environment",
    "gradients plots status",
    "data models training",
    "descent",
    "experiments",
    "report",
    "listing replay",
    "running",
    "main __main__",
]


def name_of(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports():
    """`{module: modules of the package that it imports}`, inside functions too."""
    files = {name_of(file): file for file in PACKAGE.rglob("*.py")}
    found = {}
    for name, file in files.items():
        if name == "tf_gsnr":
            continue
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tf_gsnr"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    names.add(inner if inner in files else node.module)
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name in files}
        found[name] = names - {name, "tf_gsnr"}
    return found


def floor(module):
    room = module.split(".")[1]
    return next(k for k, names in enumerate(FLOORS) if room in names.split())


def test_benchmarks_import_what_is_there():
    missing = []
    for file in (PACKAGE.parent / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tf_gsnr"):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name):
                        try:
                            importlib.import_module(f"{node.module}.{name}")
                        except ModuleNotFoundError:
                            missing.append((file.name, node.module, name))
    assert not missing


def test_no_circle():
    graph = imports()
    # A package that only registers what is in it is no link of a circle.
    graph["tf_gsnr.gradients.layerwise"] = set()
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)


def test_no_import_upwards():
    up = [(a, b) for a, of in imports().items() for b in of if floor(b) > floor(a)]
    assert not up


def test_every_file_has_its_line():
    page = PAGE.read_text()
    files = [file for file in PACKAGE.rglob("*.py") if not file.name.startswith("__")]
    inner = PACKAGE / "experiments"
    files = [f for f in files if inner not in f.parents or f.parent.name == "framework"]
    assert not [f.name for f in files if f"`{f.name}`" not in page and f"{f.name}`" not in page]


def test_looking_at_a_run_needs_no_tensorflow():
    modules = [
        "tf_gsnr.records",
        "tf_gsnr.plots",
        "tf_gsnr.report.__main__",
        "tf_gsnr.shown",
        "tf_gsnr.status.figure",
    ]
    for name in experiments.EXPERIMENTS:
        modules += [f"tf_gsnr.experiments.{name}.{file}" for file in ("settings", "figure")]
    code = f"import sys, {', '.join(modules)}; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
