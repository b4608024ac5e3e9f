"""Compile, optimizers, metrics, fit, and what happens between fits."""

import keras
import numpy as np

from situations.parts import BINARY, SGD, WEIGHTS, N, O, X, Y, case, fit, how, mlp

for name, options in (
    ("run_eagerly", dict(run_eagerly=True)),
    ("jit_compile", dict(jit_compile=True)),
    ("steps_per_execution, with a remainder", dict(steps_per_execution=2)),
):
    whole = fit(X[:16], Y[:16], epochs=2) if "jit" in name else fit()
    case(name, "compile: how steps are run", mlp(), how(metrics=["mae"], **options), whole)


class SignDescent(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, O.sign(gradient) * O.cast(learning_rate, variable.dtype))


OPT = keras.optimizers
for name, make, tolerance in (
    ("Adam", lambda: OPT.Adam(0.01), 1e-3),
    ("AdamW, weights excluded from decay", lambda: excluded(), 1e-3),
    ("Lion", lambda: OPT.Lion(0.01), 1e-2),
    ("Muon", lambda: OPT.Muon(0.01), 2e-2),
    ("clipnorm", lambda: SGD(0.3, clipnorm=0.05), 1e-4),
    ("global_clipnorm and momentum", lambda: SGD(0.3, 0.9, True, global_clipnorm=0.1), 1e-4),
    ("gradient accumulation", lambda: SGD(0.3, gradient_accumulation_steps=2), 1e-5),
    (
        "average of weights",
        lambda: SGD(0.3, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3),
        1e-5,
    ),
    ("loss_scale_factor", lambda: SGD(0.3, loss_scale_factor=8.0), 1e-5),
    ("LossScaleOptimizer", lambda: OPT.LossScaleOptimizer(SGD(0.3), dynamic_growth_steps=2), 1e-5),
    ("schedule", lambda: SGD(OPT.schedules.CosineDecay(0.3, 4)), 1e-5),
    ("optimizer of one's own", lambda: SignDescent(0.01), 1e-2),
):
    options = dict(tolerance=tolerance, evaluates=False)
    case(f"optimizer: {name}", "optimizers", mlp(), how(optimizer=make), fit(), **options)


def excluded():
    optimizer = OPT.AdamW(0.01, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


class Worst(keras.metrics.Metric):
    def __init__(self):
        super().__init__(name="worst")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y, y_pred, sample_weight=None):
        self.value.assign(O.maximum(self.value, O.max(O.abs(y - y_pred))))

    def result(self):
        return self.value


case(
    "metrics of every kind",
    "compile: functions, names and metrics of one's own, weighted",
    mlp(1, "sigmoid"),
    lambda: how(
        "binary_crossentropy",
        metrics=["accuracy", keras.metrics.AUC(name="auc"), lambda y, p: O.mean(p), Worst()],
        weighted_metrics=[keras.metrics.F1Score(threshold=0.5, name="f1")],
    )(),
    fit(y=BINARY, sample_weight=WEIGHTS),
)


def merged(*histories):
    """Histories of several fits, one after another."""
    return {f"{i}/{k}": v for i, h in enumerate(histories) for k, v in h.history.items()}


def several_fits(model, how, data):
    model.compile(**how)
    return merged(model.fit(**data), model.fit(**data, initial_epoch=1), model.fit(**data))


def recompiled(model, how, data):
    model.compile(**how)
    first = model.fit(**data)
    model.compile(SGD(0.05), "mae", metrics=["mse"])
    return merged(first, model.fit(**data))


def unfrozen(model, how, data):
    model.layers[0].trainable = False
    model.compile(**how)
    first = model.fit(**data)
    model.layers[0].trainable = True
    model.compile(**how | dict(optimizer=SGD(0.01)))
    return merged(first, model.fit(**data))


def frozen_after_compile(model, how, data):
    model.compile(**how)
    first = model.fit(**data)
    model.layers[0].trainable = False
    return merged(first, model.fit(**data))


def another_rate(model, how, data):
    model.compile(**how)
    first = model.fit(**data)
    model.optimizer.learning_rate = 0.01
    return merged(first, model.fit(**data))


def by_batches(model, how, data):
    model.compile(**how)
    steps = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, N, 8)]
    logs = [model.train_on_batch(*batch, return_dict=True) for batch in steps]
    tested = model.test_on_batch(X, Y, return_dict=True)
    history = {k: [log[k] for log in logs] for k in ("loss", "mae")}
    return history | {"test": [tested["loss"]], "first": [np.sum(model.predict_on_batch(X))]}


def with_callbacks(model, how, data):
    model.compile(**how)
    callbacks = [
        keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=0, min_delta=1.0),
        keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.SwapEMAWeights(),
    ]
    return model.fit(**data, callbacks=callbacks, validation_data=(X, Y)).history


def weights_set_between(model, how, data):
    model.compile(**how)
    start = model.get_weights()
    first = model.fit(**data)
    model.set_weights(start)
    return merged(first, model.fit(**data))


AVERAGED = lambda: SGD(0.1, use_ema=True)  # noqa: E731
for name, use, optimizer in (
    ("several fits in a row", several_fits, None),
    ("compiled again between fits", recompiled, None),
    ("unfrozen between fits, compiled again", unfrozen, None),
    ("frozen between fits, not compiled again", frozen_after_compile, None),
    ("another learning rate between fits", another_rate, None),
    ("train_on_batch", by_batches, None),
    ("callbacks that act", with_callbacks, AVERAGED),
    ("weights set between fits", weights_set_between, None),
):
    case(
        name,
        "fit: what happens between fits and around steps",
        mlp(),
        how(optimizer=optimizer, metrics=["mae"]),
        fit(),
        use=use,
    )
case(
    "layer by layer",
    "options: a number for each layer, of a batch alone",
    mlp(),
    how(),
    fit(),
    gsnr=dict(per_layer=True, measure_every=2),
)
