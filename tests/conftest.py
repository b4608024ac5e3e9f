"""What all tests share."""

import os

# As in the binaries: convolutions on a CPU are several times faster.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest  # noqa: E402

# The files that take most of the time; `make test-fast` leaves them out.
SLOW = """
callback data devices distributed dynamics ensemble equality gap keras_hub large_layers layerwise
lifecycle docs_code main model osgr osgr_cifar random_compositions ranking recurrent recorder report
sample situations situations_moments sums threads trust
""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in {f"test_{name}" for name in SLOW}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tfds_dir():
    """The directory of real MNIST and CIFAR-10, prepared by TensorFlow Datasets."""
    directory = os.environ.get("TFDS_DATA_DIR")
    if not directory:
        pytest.skip("TFDS_DATA_DIR is not set: no real data here")
    return directory
