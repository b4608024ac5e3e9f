"""Packaging of tf_gsnr; see BUILD.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "tf_gsnr/__init__.py").read_text()).group(1)

setup(
    name="tf_gsnr",
    version=VERSION,
    description="The gradient signal-to-noise ratio of every parameter of a Keras model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["generalization", "gradient signal-to-noise ratio", "per-example gradients", "keras"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["tf_gsnr", "tf_gsnr.*"]),
    entry_points={"console_scripts": ["tf_gsnr = tf_gsnr.__main__:main"]},
    package_data={"tf_gsnr": ["py.typed", "status/*.js", "status/*.css"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "absl-py",
        "keras>=3.8",
        "matplotlib>=3.7",
        "numpy",
        "tensorflow>=2.18",
        "tensorflow-datasets>=4.9",
        # tensorflow-datasets imports it and does not declare it.
        "importlib_resources",
    ],
    extras_require={
        # pytest-xdist: tracing keeps one core busy, and there are two.
        "test": ["pytest", "pytest-xdist", "tensorboard"],
        "tensorboard": ["tensorboard"],
        "gpu": ["tensorflow[and-cuda]"],
        "dev": ["build", "mypy", "ruff"],
    },
)
