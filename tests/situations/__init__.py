"""The table of situations: `SITUATIONS`, name to `Situation`; `parts.py` says what one is."""

from situations import (  # noqa: F401  (each adds its own to the table)
    data,
    given,
    given_from_14,
    layers,
    losses,
    masks,
    running,
    structure,
    subclasses,
    uneven,
)
from situations.parts import SITUATIONS, Situation  # noqa: F401
