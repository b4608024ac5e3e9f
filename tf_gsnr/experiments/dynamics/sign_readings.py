"""Figure 5c: the readings of "the proportion of examples with the same sign", drawn and judged.

What is averaged and how decides the number, so each reading has its curve and its verdict. On the
scale of the paper, a majority's share, a corrected agreement A of two examples is

    1/2 + 1/2 sqrt(2 A - 1),

since A_j = 1/2 + 1/2 (2 p_j - 1)^2 if parameter j has a share p_j of one sign: for a mean of A_j
it is the share at the root mean square of 2 p_j - 1, without what is chance at n examples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tf_gsnr.plots.claims import Claim, beyond, verdict, with_error
from tf_gsnr.plots.style import curves, draw_mean, over_seeds, plt

START, END = 0.50, 0.56  # [text] about these
ABOUT, RISE = 0.025, 0.03  # [ours] from the start, and the least rise, half of the paper's
FEW = 8  # layers that are named
PLAIN, CORRECTED = "same_sign_plain", "same_sign"
MEANS = {
    "mean": "all parameters",
    "layers": "mean over layers",
    "convolutions": "convolutions' parameters",
    "convolution_layers": "mean over convolutions",
}
READINGS = {
    f"{agreement}/{mean}": f"{kind}, {of}"
    for agreement, kind in ((PLAIN, "majority's sign"), (CORRECTED, "corrected"))
    for mean, of in MEANS.items()
} | {
    "same_sign_of_all/mean": "majority's sign among all examples, zeros too, all parameters",
    "step_sign/mean": "the mean gradient's sign, all parameters",
}


class Measured(NamedTuple):
    """A reading over the seeds of one network.

    Attributes:
      name, text: of the field, and in words.
      start, late: `[seeds]`, before training and over the last quarter of the epochs.
      best: the largest mean over seeds, and its epoch.
    """

    name: str
    text: str
    start: np.ndarray
    late: np.ndarray
    best: tuple

    @property
    def distance(self) -> float:
        """How far from the paper's numbers, start and end."""
        return abs(self.start.mean() - START) + abs(self.late.mean() - END)


def shares(records, name):
    """`(epochs, values [seeds, k])` of a field, on the scale of a majority's share."""
    epochs, values = curves(records, name)
    if name.startswith(f"{CORRECTED}/"):
        values = 0.5 + 0.5 * np.sqrt(np.maximum(2 * values - 1, 0))
    return epochs, values


def readings(records) -> list[Measured]:
    """All that these records have: earlier ones are without layers."""
    return [measured(records, *item) for item in READINGS.items() if item[0] in records[0]]


def measured(records, name, text) -> Measured:
    epochs, values = shares(records, name)
    mean = values.mean(0)
    best = int(mean.argmax())
    late = values[:, -max(len(epochs) // 4, 1) :].mean(1)
    return Measured(name, text, values[:, 0], late, (mean[best], epochs[best]))


def table(records) -> list[str]:
    """A line per reading, and per layer where they are few: start, maximum, end."""
    by_layer = [(field, f"majority's sign, {name}") for field, name, _ in layers(records, PLAIN)]
    rows = readings(records)
    rows += [measured(records, *one) for one in by_layer if len(by_layer) <= FEW]
    return [f"{'same sign, real labels':>62}  start  maximum (epoch)  last quarter"] + [
        f"{r.text:>62}  {r.start.mean():5.1%}  {r.best[0]:7.1%} ({r.best[1]:5.0f})"
        f"  {r.late.mean():12.1%}"
        for r in rows
    ]


def claims(model: str, real, random) -> list[Claim]:
    """A claim for each reading on real labels; `random`, which may be empty, stands beside it."""
    all_readings = readings(real)
    beside = {r.name: r for r in (readings(random) if random else [])}
    nearest = min(all_readings, key=lambda r: r.distance)
    return [
        _claim(model, reading, beside.get(reading.name), _why(reading, real, nearest))
        for reading in all_readings
    ]


def _claim(model, reading, random, why):
    start, end = over_seeds(reading.start), over_seeds(reading.late)
    rise = over_seeds(reading.late - reading.start)
    like_it = abs(start[0] - START) < ABOUT and rise[0] > RISE
    other = f"; random labels {random.late.mean():.1%} at the end" if random else ""
    return Claim(
        "figure 5c",
        f"{model}, real labels: the share of gradients of one sign rises ({reading.text})",
        "about 50% to about 56% [text]",
        f"{with_error(*start, '.1%')} to {with_error(*end, '.1%')} "
        f"({with_error(*rise, '+.1%')}), at most {reading.best[0]:.1%} "
        f"(epoch {reading.best[1]:.0f}){other}",
        verdict(bool(like_it and beyond(*rise)), beyond(*rise)),
        why,
    )


def _why(reading, real, nearest):
    if reading.name != f"{PLAIN}/mean":
        return ""
    by_layer = layers(real, PLAIN)
    if not by_layer:
        return WHY
    starts = {name: curves(real, key)[1][:, 0].mean() for key, name, _ in by_layer}
    inner = [starts[name] for _, name, convolution in by_layer if convolution]
    text = ", ".join(f"{name} {share:.0%}" for name, share in starts.items())
    if len(starts) > FEW and inner:
        last = text.rpartition(", ")[2]
        text = f"convolutions {min(inner):.0%} to {max(inner):.0%}, {last}"
    return (
        f"{WHY}. By layer, at the start: {text}. The reading nearest to the paper's numbers: "
        f"{nearest.text} ({nearest.start.mean():.1%} to {nearest.late.mean():.1%}, at most "
        f"{nearest.best[0]:.1%})"
    )


WHY = (
    "what enters a layer behind a ReLU is never negative, so at small last weights the sign of an "
    "example's gradient depends on its class and unit alone: in the last layer one class in C has "
    "the other sign, 1 - 1/C agree (90% of ten classes); in a dense layer before it the majority "
    "of C random signs, E max(k, C - k) / C (62%), and over 85% of one class's examples do agree "
    "(tests/experiments/test_dynamics.py). It is not chance: corrected for the number of examples "
    "it is as high. Where most parameters are in such a layer, the mean over all is its"
)


def layers(records, agreement) -> list[tuple]:
    """`(field, name, whether a convolution)` of each layer, in the order of the model."""
    found = []
    for field in records[0]:
        for kind in ("convolution", "other"):
            prefix = f"{agreement}/{kind}/"
            if field.startswith(prefix):
                name = field.removeprefix(prefix).split("/", 1)[-1]
                found.append((field, name, kind == "convolution"))
    return found


def draw_layers(axis, records):
    """The majority's share layer by layer on real labels, and both means over all of them."""
    by_layer = layers(records, PLAIN)
    convolutions = sum(inner for *_, inner in by_layer)
    few, above = len(by_layer) <= FEW, []
    shown = 0
    for field, name, inner in by_layer:
        epochs, values = curves(records, field)
        colour = "0.6"
        if inner:
            colour = plt.get_cmap("viridis")(0.9 * shown / max(convolutions - 1, 1))
            shown += 1
        if values.mean() > 0.7:
            above.append(f"{name} {values.mean():.0%}")
            continue
        label = name if few else None
        mean, line = values.mean(0), "-" if inner else "--"
        axis.plot(epochs, mean, line, color=colour, linewidth=1.2, label=label)
    axis.plot(*_mean(records, "mean"), color="black", linewidth=2, label="all parameters")
    axis.plot(*_mean(records, "layers"), ":", color="black", linewidth=2, label="mean over layers")
    if above:
        axis.plot([], [], " ", label=f"above: {', '.join(above)}")
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.4 * (top - bottom))  # room for the legend
    axis.legend(loc="upper left", frameon=False, fontsize=7.5, ncols=2)


def draw_readings(axis, real, random):
    """The readings that part most: plain and corrected, of all parameters and of convolutions."""
    colours = {"mean": "#2a6fbb", "convolution_layers": "#3d8b57"}
    for mean, colour in colours.items():
        for agreement, line in ((PLAIN, "-"), (CORRECTED, "--")):
            name = f"{agreement}/{mean}"
            text = f"{MEANS[mean]}{', corrected' * (agreement == CORRECTED)}"
            epochs, values = shares(real, name)
            if len(values):
                draw_mean(axis, epochs, values, line, color=colour, label=text)
            epochs, values = shares(random, name)
            if len(values) and agreement == PLAIN:
                axis.plot(epochs, values.mean(0), ":", color=colour, linewidth=1)
    axis.axhspan(START, END, color="0.9", zorder=0)
    axis.legend(frameon=False, fontsize=7.5)


def _mean(records, mean):
    epochs, values = curves(records, f"{PLAIN}/{mean}")
    return epochs, values.mean(0)
