"""GSNR during training on real and on random labels: figure 5, and shallow models beside it."""

from __future__ import annotations

import numpy as np

from tf_gsnr.experiments.dynamics import sign_readings
from tf_gsnr.experiments.framework.statistics import pearson
from tf_gsnr.plots.claims import Claim, beyond, verdict, with_error
from tf_gsnr.plots.style import by, column, curves, draw_mean, over_seeds, plt

REAL, RANDOM, BETWEEN = "#2a6fbb", "#c8553d", "0.5"
SIGNS = {"same_sign_plain/mean": "-", "step_sign/mean": ":"}  # of records without layers


def summary(records: list[dict]) -> dict:
    """Per network and share of random labels: the means over the seeds, along the epochs.

    Returns:
      `{model: {p_random (as text): {...}}}` with `seeds`, `epochs`, and `gsnr_plain`, `gsnr`,
      `same_sign_plain`, `step_sign`, `train_accuracy`, `test_accuracy`, each a list by epoch.
    """
    names = ("gsnr_plain/mean", "gsnr/mean", "same_sign_plain/mean", "step_sign/mean")
    by_network = {}
    for model, group in by(records, "model").items():
        by_network[model] = {}
        for p_random, same in by(group, "p_random").items():
            epochs, values = curves(same, "gsnr_plain/mean")
            by_network[model][str(p_random)] = {"seeds": len(values), "epochs": epochs.tolist()} | {
                name.removesuffix("/mean"): curves(same, name)[1].mean(0).tolist()
                for name in (*names, "train_accuracy", "test_accuracy")
            }
    return by_network


def table(records: list[dict]) -> str:
    """Start, maximum and end for a terminal, a line per network and share of random labels."""
    lines = [
        "              model  p_random  seeds   GSNR: start     maximum (epoch)      end"
        "   same sign: start   end   train acc.  test acc."
    ]
    for model, shares in summary(records).items():
        for p_random, s in shares.items():
            best = int(np.nanargmax(s["gsnr_plain"]))
            lines.append(
                f"{model:>19}  {p_random:>8}  {s['seeds']:5d}  {s['gsnr_plain'][0]:12.4f}"
                f"  {s['gsnr_plain'][best]:10.4f} ({s['epochs'][best]:5.0f})"
                f"  {s['gsnr_plain'][-1]:7.4f}"
                f"  {s['same_sign_plain'][0]:16.1%}  {s['same_sign_plain'][-1]:5.1%}"
                f"  {s['train_accuracy'][-1]:10.1%}  {s['test_accuracy'][-1]:9.1%}"
            )
    for model, group in by(records, "model").items():
        real = [r for r in group if r["p_random"] == 0]
        if real and sign_readings.layers(real, sign_readings.PLAIN):
            lines += ["", model, *sign_readings.table(real)]
    return "\n".join(lines)


def figure(records: list[dict]) -> plt.Figure:
    """Figure 5: a row per network; over the epochs GSNR, the share of one sign by layer and by what
    is averaged, accuracy."""
    models = by(records, "model")
    drawn, axes = plt.subplots(
        len(models), 4, figsize=(16, 3.7 * len(models) + 0.4), squeeze=False, layout="constrained"
    )
    for row, (model, group) in zip(axes, models.items()):
        shares = by(group, "p_random")
        for p_random, same in shares.items():
            _row(row, same, p_random)
        _signs(row, group, shares)
        row[0].axhline(1 / group[0]["count"], color="0.6", linestyle=":", linewidth=1, zorder=0)
        row[0].set(ylabel=f"{model}\nGSNR (25), mean over parameters", ylim=(0, None))
        row[1].set(ylabel="share of examples")
        row[3].set(ylabel="accuracy", ylim=(0, 1))
        for axis in row:
            axis.set(xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.25)
    titles = (
        "GSNR",
        "same-sign proportion, by layer",
        "same-sign proportion, by reading",
        "accuracy",
    )
    notes = (
        "dotted grey: the bias 1/n of the estimate",
        "real labels; convolutions: the first dark; dashed: other layers",
        "grey: the paper's 50 to 56%; dotted: random labels",
        "solid: training (own labels); dashed: test (true labels)",
    )
    for axis, title, note in zip(axes[0], titles, notes):
        axis.set_title(f"{title}\n", fontsize=12)
        axis.text(0.5, 1.03, note, transform=axis.transAxes, ha="center", fontsize=8.5)
    axes[0][0].legend(frameon=False)
    first = records[0]
    seeds = len({r["seed"] for r in records})
    drawn.suptitle(
        f"{first['dataset']}, n = {first['n']}, SGD: learning rate {first['learning_rate']:g}, "
        f"batch {first['batch_size']}; mean over {seeds} seed{'s' * (seeds > 1)}"
        f"{', band: one standard error' * (seeds > 1)}",
        fontsize=11,
    )
    return drawn


def _row(row, records, p_random):
    """The curves of one network and one share of random labels."""
    shares = {0.0: (REAL, "real labels"), 1.0: (RANDOM, "random labels")}
    colour, label = shares.get(p_random, (BETWEEN, f"p_random = {p_random:g}"))
    draw_mean(row[0], *curves(records, "gsnr_plain/mean"), color=colour, label=label)
    for name, line in (("train_accuracy", "-"), ("test_accuracy", "--")):
        draw_mean(row[3], *curves(records, name), color=colour, linestyle=line)


def _signs(row, group, shares):
    """Figure 5c. Of records without layers: the majority's sign, dotted the mean gradient's."""
    real, random = shares.get(0.0, group), shares.get(1.0, [])
    if sign_readings.layers(real, sign_readings.PLAIN):
        sign_readings.draw_layers(row[1], real)
    else:
        for name, line in SIGNS.items():
            draw_mean(row[1], *curves(real, name), color=REAL, linestyle=line)
    sign_readings.draw_readings(row[2], real, random)


def claims(records: list[dict]) -> list[Claim]:
    """Figure 5's claims of each network, on its records with real labels and with random ones; of
    a single layer, section 3.1's. An unfinished run has those that it can test."""
    all_claims = []
    for model, group in by(records, "model").items():
        shares = by(group, "p_random")
        real, random = shares.get(0.0, []), shares.get(1.0, [])
        if not any(r["epoch"] > 0 for r in real):
            continue
        if group[0]["layers"] == 1:
            all_claims.append(_declines(model, real))
            continue
        all_claims += [_rises(model, real), *sign_readings.claims(model, real, random)]
        if any(r["epoch"] > 0 for r in random):
            all_claims.append(_separates(model, real, random))
    return all_claims


def _rises(model, real):
    epochs, values = curves(real, "gsnr_plain/mean")
    start, mean, late = values[:, 0], values.mean(0), _late(values)
    rise, error = over_seeds(late - start)
    best = int(mean.argmax())
    top, top_error = over_seeds(values[:, best] - start)
    return Claim(
        "figure 5a, b",
        f"{model}, real labels: the GSNR rises early and stays high",
        "no number given; rising [text]",
        f"{mean[0]:.4f} at the start, at most {mean[best]:.4f} (epoch {epochs[best]:.0f}), "
        f"{late.mean():.4f} over the last quarter ({with_error(rise, error, '+.4f')})",
        verdict(beyond(rise, error), beyond(top, top_error)),
        WHY_JAGGED if model == "simple_cnn" else "",
    )


WHY_JAGGED = (
    "the curve of one seed jumps from epoch to epoch. The weights swing along a sharp direction, "
    "and the GSNR of an epoch is that of its last step: on another probe it jumps alike "
    "(correlation of log GSNR 0.84), four steps earlier it is another one (-0.03); one step to the "
    "minimum along the gradient leaves 3% of the variance from epoch to epoch, weights averaged "
    "over 32 steps leave 0.7%, and there the GSNR does not rise at all (0.0027 to 0.0012, four "
    "seeds, half this width): flags/dynamics_jagged.flags"
)


def _separates(model, real, random):
    both = [curves(share, "gsnr_plain/mean") for share in (real, random)]
    epochs = sorted(set(both[0][0]) & set(both[1][0]) - {0})
    high, low = (values.mean(0)[np.isin(own, epochs)] for own, values in both)
    bias = 1 / column(real, "count").mean()
    return Claim(
        "figure 5a, b",
        f"{model}, random labels: the GSNR stays low throughout",
        "no number given; low [text]",
        f"{low.min():.4f} to {low.max():.4f}, on real labels {high.min():.4f} to {high.max():.4f}; "
        f"1/n, the bias of (25), is {bias:.4f}",
        verdict(
            bool((low < high).all() and low.mean() < high.mean() / 2), low.mean() < high.mean()
        ),
    )


def _declines(model, real):
    epochs, values = curves(real, "gsnr_plain/mean")
    mean = values.mean(0)
    falls = beyond(*over_seeds(values[:, 0] - _late(values)))
    rank = _spearman(epochs, mean)
    return Claim(
        "section 3.1",
        f"{model}, a shallow model: the GSNR declines during the whole training",
        "declining [text]",
        f"{mean[0]:.4f} to {_late(values).mean():.4f}; Spearman correlation with the epoch "
        f"{rank:.2f}",
        verdict(falls and rank < -0.9, falls),
    )


def _late(values):
    """Per seed, the mean over the last quarter of the epochs."""
    return values[:, -max(values.shape[1] // 4, 1) :].mean(1)


def _spearman(x, y):
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    return pearson(*ranks)
