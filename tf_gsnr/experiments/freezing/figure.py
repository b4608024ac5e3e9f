"""The GSNR of the second layer with the first one learning or frozen: figure 6 and table 1."""

from __future__ import annotations

import numpy as np

from tf_gsnr.plots import style
from tf_gsnr.plots.claims import Claim, beyond, verdict, with_error
from tf_gsnr.plots.style import by, column, over_seeds, plt

COLOURS = {False: "#2a6fbb", True: "#c8553d"}
LABELS = {False: "whole network", True: "first layer frozen"}
BEST = 5  # rows of table 1


def curves(records: list[dict], frozen: bool, name: str):
    """`(steps [k], values [seeds, k])` of a field, for all seeds that are complete."""
    return style.curves([r for r in records if r["frozen"] == frozen], name)


def features(records: list[dict], seed: int | None = None) -> list[dict]:
    """Table 1: the features whose GSNR rises most, in the whole network of a seed (the first).

    Returns:
      Per feature: `feature`, `gsnr_start`, `gsnr_max`, `step` of the maximum, and the Pearson
      correlation with the target `correlation_start` and `correlation_max`, at the maximum.
    """
    path = _path(records, seed)
    names = [k.removeprefix("gsnr_plain/") for k in path[0] if k.startswith("gsnr_plain/feature")]
    rows = []
    for name in names:
        ratio = column(path, f"gsnr_plain/{name}")
        if not np.isfinite(ratio).any():
            continue
        best = int(np.nanargmax(ratio))
        rows.append(
            {
                "feature": int(name.removeprefix("feature")),
                "gsnr_start": ratio[0],
                "gsnr_max": ratio[best],
                "step": path[best]["epoch"],
                "correlation_start": path[0][f"correlation/{name}"],
                "correlation_max": path[best][f"correlation/{name}"],
            }
        )
    return sorted(rows, key=lambda row: row["gsnr_start"] - row["gsnr_max"])[:BEST]


def _path(records, seed=None) -> list[dict]:
    """The whole network's records of a seed (the first there is), by step."""
    whole = sorted((r for r in records if not r["frozen"]), key=lambda r: (r["seed"], r["epoch"]))
    seed = whole[0]["seed"] if whole and seed is None else seed
    return [r for r in whole if r["seed"] == seed]


def summary(records: list[dict]) -> dict:
    """Start, maximum and end of the mean GSNR over the seeds, and table 1."""
    result: dict = {}
    for frozen, label in ((False, "whole"), (True, "frozen")):
        if any(r["frozen"] == frozen for r in records):
            steps, values = curves(records, frozen, "gsnr_plain/second_layer")
            mean = values.mean(0)
            result[label] = {
                "seeds": len(values),
                "gsnr_start": mean[0],
                "gsnr_max": mean.max(),
                "step_of_max": steps[mean.argmax()],
                "gsnr_end": mean[-1],
            }
    if any(not r["frozen"] for r in records):
        result["features"] = features(records)
    return result


def table(records: list[dict]) -> str:
    """The summary as two tables for a terminal."""
    result = summary(records)
    lines = ["first layer  seeds  GSNR at start  maximum (step)  at end"]
    for label in ("whole", "frozen"):
        if label in result:
            s = result[label]
            lines.append(
                f"{'learns' if label == 'whole' else 'frozen':>11}  {s['seeds']:5d}"
                f"  {s['gsnr_start']:13.4f}  {s['gsnr_max']:.4f} ({s['step_of_max']:.0f})"
                f"  {s['gsnr_end']:8.4f}"
            )
    lines += ["", "feature  correlation with y at start  at its GSNR's maximum (step)"]
    for row in result.get("features", []):
        lines.append(
            f"{row['feature']:7d}  {row['correlation_start']:27.2f}"
            f"  {row['correlation_max']:21.2f} ({row['step']:.0f})"
        )
    return "\n".join(lines)


MARKED = 1.25  # [ours] a GSNR that reaches this multiple of its start has risen markedly
INITIAL = (
    "The paper does not give the initial weights, and they decide this: from weights of standard "
    "deviation 0.05 and 0.1 the GSNR rises, from 0.3 and more, or Glorot's, it falls from the "
    "start whether the first layer is frozen or not (--initial_scale=0.3)."
)


def claims(records: list[dict]) -> list[Claim]:
    """Figure 6, whole and frozen, and table 1."""
    measured = {r["frozen"] for r in records if r["epoch"] > 0}
    whole, frozen = False in measured, True in measured
    return (
        ([_rises(records)] if whole else [])
        + ([_stays_low(records)] if frozen else [])
        + ([_correlates(records)] if whole else [])
    )


def _rises(records):
    steps, values = curves(records, False, "gsnr_plain/second_layer")
    mean = values.mean(0)
    best = int(mean.argmax())
    rise, se = over_seeds(values[:, best] - values[:, 0])
    marked = mean[best] >= MARKED * mean[0]
    return Claim(
        "figure 6",
        "The first layer learning, the mean GSNR of the second layer's parameters rises markedly.",
        '"a significant upward process" [text]',
        f"{mean[0]:.3f} to {mean[best]:.3f} at step {steps[best]:.0f}, a rise of "
        f"{with_error(rise, se, '+.3f')} ({len(values)} seeds)",
        verdict(marked and beyond(rise, se), beyond(rise, se)),
        INITIAL,
    )


def _stays_low(records):
    steps, values = curves(records, True, "gsnr_plain/second_layer")
    mean, changes = values.mean(0), values - values[:, :1]
    early = mean[1 : max(2, len(mean) // 4)]  # [ours] "in the beginning": the first quarter
    lowest, highest = 1 + int(early.argmin()), 1 + int(mean[1:].argmax())
    fall, fall_se = over_seeds(changes[:, lowest])
    top, top_se = over_seeds(changes[:, highest])
    falls, low = beyond(-fall, fall_se), not beyond(top, top_se)
    return Claim(
        "figure 6",
        "The first layer frozen, it falls at first and stays low.",
        '"decreases in the beginning and remains at a low level" [text]',
        f"{mean[0]:.3f} to {mean[lowest]:.3f} by step {steps[lowest]:.0f}, a change of "
        f"{with_error(fall, fall_se, '+.4f')}, and {mean[-1]:.3f} at the end; after the start "
        f"never above {mean[highest]:.3f} ({len(values)} seeds)",
        verdict(falls and low, falls or low),
    )


def _correlates(records):
    seeds = {
        seed: [r for r in features(records, seed) if np.isfinite(r["correlation_start"])]
        for seed, path in by(records, "seed").items()
        if not all(r["frozen"] for r in path)
    }
    names = ("correlation_start", "correlation_max")
    sizes = [np.array([[abs(r[k]) for k in names] for r in text]) for text in seeds.values()]
    growth, se = over_seeds([np.mean(size[:, 1] - size[:, 0]) for size in sizes])
    start, top = np.concatenate(sizes).T
    grown = np.mean(top > start)
    first = next(iter(seeds.values()))
    pairs = [f"{r['correlation_start']:.2f} to {r['correlation_max']:.2f}" for r in first]
    return Claim(
        "table 1",
        "The features whose GSNR rises most come to correlate with y more strongly, in size, by "
        "the maximum of their GSNR.",
        "-0.11 to 0.47, 0.11 to 0.44, 0.07 to 0.40, -0.21 to -0.27, -0.33 to 0.53 [text]",
        f"{', '.join(pairs)} (first seed); over {len(seeds)} seeds {start.mean():.2f} to "
        f"{top.mean():.2f} in size, a growth of {with_error(growth, se, '+.2f')}; "
        f"{grown:.0%} of the features grow",
        verdict(bool(grown >= 0.8 and beyond(growth, se)), growth > 0),
    )


def figure(records: list[dict]) -> plt.Figure:
    """Figure 6: the mean over the second layer with a band over seeds; its single parameters."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for frozen in (False, True):
        if not any(r["frozen"] == frozen for r in records):
            continue
        steps, values = curves(records, frozen, "gsnr_plain/second_layer")
        style.draw_mean(left, steps, values, color=COLOURS[frozen], label=LABELS[frozen])
    left.set(
        xlabel="gradient-descent step", ylabel="GSNR, mean over the second layer", ylim=(0, None)
    )
    left.set_title(f"mean over {len(values)} seeds, band: one standard error", fontsize=10)
    left.legend(frameon=False)
    path = _path(records)
    marked = {row["feature"] for row in features(records)} if path else set()
    for name in [k for k in (path[0] if path else {}) if k.startswith("gsnr_plain/feature")]:
        number = int(name.removeprefix("gsnr_plain/feature"))
        right.plot(
            column(path, "epoch"),
            column(path, name),
            linewidth=1.6 if number in marked else 0.8,
            color=None if number in marked else "0.75",
            label=f"feature {number}" if number in marked else None,
            zorder=2 if number in marked else 1,
        )
    right.set(xlabel="gradient-descent step", ylabel="GSNR of a parameter", ylim=(0, None))
    right.set_title("single parameters of the second layer, first seed", fontsize=10)
    if marked:
        right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return drawn
