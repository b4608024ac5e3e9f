"""What each change leaves of the jumps, from the records.

Places are those of `run`: the weights, or the examples, at which is measured after an epoch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tf_gsnr.experiments.framework.statistics import pearson
from tf_gsnr.experiments.jagged import jumps
from tf_gsnr.experiments.jagged.settings import AS_IT_IS, AVERAGED, BEFORE, VARIANTS
from tf_gsnr.plots.style import by, curves

AVERAGE = f"averaged_{max(AVERAGED)}"
PLACES = {
    "end": "the weights as they are",
    "other_probe": "another probe",
    "larger_probe": "both probes together",
    **{f"before_{k}": f"{k} step{'s' * (k > 1)} earlier" for k in BEFORE},
    "line_minimum": "one step to the line's minimum",
    **{f"averaged_{k}": f"weights averaged over {k} steps" for k in AVERAGED},
}


class Cause(NamedTuple):
    """One thing changed: what is left of the jumps.

    Attributes:
      variant, place, text: what was changed, in the training or in the measurement.
      level: `[seeds]`, the mean over the epochs of the corrected GSNR.
      variance: `[seeds]`, from epoch to epoch, of the plain GSNR.
      ratio: of the variances, over that of the training as it is, at its weights.
      like: the mean over seeds of the correlation of log GSNR with that one's.
    """

    variant: str
    place: str
    text: str
    level: np.ndarray
    variance: np.ndarray
    ratio: jumps.Ratio
    like: float


def causes(records: list[dict]) -> list[Cause]:
    """Every place of the training as it is, then the last weights and their average of the others.

    Of the seeds that have all variants complete, from epoch 1 on; none where there is none.
    """
    records = complete(records)
    by_variant = by([r for r in records if r["epoch"] > 0], "variant")
    if AS_IT_IS not in by_variant:
        return []
    own = curves(by_variant[AS_IT_IS], "gsnr_plain/end")[1]
    if own.shape[1] < 3:
        return []
    found = []
    for variant in sorted(by_variant, key=list(VARIANTS).index):
        places = PLACES if variant == AS_IT_IS else ("end", AVERAGE)
        for place in places:
            plain = curves(by_variant[variant], f"gsnr_plain/{place}")[1]
            level = curves(by_variant[variant], f"gsnr/{place}")[1].mean(1)
            text = PLACES[place] if variant == AS_IT_IS else VARIANTS[variant]
            if variant != AS_IT_IS and place != "end":
                text += ", averaged weights"
            ratio = jumps.ratio(jumps.variance(plain), jumps.variance(own))
            like = np.mean([pearson(np.log(a), np.log(b)) for a, b in zip(plain, own)])
            found.append(
                Cause(variant, place, text, level, jumps.variance(plain), ratio, float(like))
            )
    return found


def complete(records: list[dict]) -> list[dict]:
    """The records of the seeds that have all epochs of all variants."""
    variants = {r["variant"] for r in records}
    epochs = {r["epoch"] for r in records}
    seeds = by(records, "seed")
    whole = [s for s, g in seeds.items() if len(g) == len(variants) * len(epochs)]
    return [r for r in records if r["seed"] in whole]
