"""What all tests share."""

import os

# As in the binaries: convolutions on a CPU are several times faster.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tfds_dir():
    """The directory of real MNIST and CIFAR-10, prepared by TensorFlow Datasets."""
    directory = os.environ.get("TFDS_DATA_DIR")
    if not directory:
        pytest.skip("TFDS_DATA_DIR is not set: no real data here")
    return directory
