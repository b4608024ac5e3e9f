"""Every use of what Keras and TensorFlow do not document, each by a name of its own.

Seen in Keras 3.8 to 3.15 and TensorFlow 2.18 to 2.21. Where a release has moved a part, the
function says which part and which release. Nothing else in this package may touch a private part:
ruff's SLF001 sees to that, and `tests/test_keras_internals.py` tells what a new release breaks.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref

import keras
import tensorflow as tf

try:
    from keras.src.utils.rng_utils import get_random_seed
except ImportError:  # which Keras 3.8 has not
    get_random_seed = None
try:
    from tensorflow.python.framework.ops import gradient_registry as registry
except ImportError:  # then the graphs of models that went stay behind
    registry = None

try:
    from tensorflow.python.ops.parallel_for import pfor
except ImportError:
    pfor = None


def _part(owner, name):
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            f"Keras {keras.__version__} with TensorFlow {tf.__version__} has no "
            f"{type(owner).__name__}.{name}, which tf_gsnr needs and which Keras 3.8 to 3.15 have: "
            "take one of those releases, and see tf_gsnr/keras_internals.py"
        ) from None


# Layers


def layers_in(layer, include_self: bool = True) -> list:
    """Every layer in a layer, itself and those inside other layers included, each once."""
    layers = _part(layer, "_flatten_layers")(include_self=include_self)
    return list({id(one): one for one in layers}.values())


def layers_directly_in(layer) -> list:
    """The layers that a layer holds itself, at no deeper level."""
    return list(_part(layer, "_layers"))


def is_rematerialised(layer) -> bool:
    """Whether Keras recomputes the layer in the backward pass, so that its inside has no tape.

    Not in releases before 3.9, which have no such mode.
    """
    return getattr(layer, "_remat_mode", None) is not None


def is_seed(variable) -> bool:
    """Whether it is the state of a `keras.random.SeedGenerator`, which has no mark but its name."""
    return variable.name == "seed_generator_state"


def mask_of(tensor):
    """The mask that Keras has attached to a tensor, or None; absent in most cases."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor, mask):
    """Attaches a mask, as Keras does, unless it is None."""
    if mask is not None:
        tensor._keras_mask = mask


def logits_of(tensor):
    """What a softmax or sigmoid of Keras was made of, which crossentropies use in its place."""
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor, logits):
    """Attaches logits, as Keras does, unless they are None."""
    if logits is not None:
        tensor._keras_logits = logits


def attached(made, tensor, change):
    """Gives `made`, a changed tensor, what Keras attached to that tensor, changed likewise."""
    for of, give in ((mask_of, set_mask), (logits_of, set_logits)):
        value = of(tensor)
        give(made, None if value is None else change(value))
    return made


# A layer looks `call`, its activation and the like up on itself, so that a function put there takes
# the place of its class's.


class _Switch:
    """A function on a layer that is another one for the threads that replaced it."""

    def __init__(self, usual, is_own):
        self.usual, self.is_own = usual, is_own
        self.stacks = {}  # thread -> what takes its place there, the last one holds

    def current(self):
        stack = self.stacks.get(threading.get_ident())
        return stack[-1] if stack else self.usual

    def __call__(self, *args, **kwargs):
        return self.current()(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.current(), name)


_SWITCHING = threading.Lock()


def function_of(layer, name):
    """The layer's function of that name, as this thread sees it; None without one."""
    function = getattr(layer, name, None)
    return function.current() if isinstance(function, _Switch) else function


@contextlib.contextmanager
def replaced(replacements):
    """While this is open, the function is `make(what it is)` for each `(layer, name, make)`.

    For this thread only: others that call the layer meanwhile find it as it was. Nothing is left
    behind on the layers, whatever fails in between.
    """
    thread, switched = threading.get_ident(), []
    try:
        for layer, name, make in replacements:
            made = make(function_of(layer, name))
            with _SWITCHING:
                switch = vars(layer).get(name)
                if not isinstance(switch, _Switch):
                    switch = _Switch(getattr(layer, name), name in vars(layer))
                    object.__setattr__(layer, name, switch)
                switch.stacks.setdefault(thread, []).append(made)
            switched.append((layer, name, switch))
        yield
    finally:
        for layer, name, switch in reversed(switched):
            with _SWITCHING:
                switch.stacks[thread].pop()
                if not switch.stacks[thread]:
                    del switch.stacks[thread]
                if not switch.stacks:
                    if switch.is_own:  # as someone else replaced it before
                        object.__setattr__(layer, name, switch.usual)
                    else:
                        object.__delattr__(layer, name)


def replaced_calls(layers, make):
    """`replaced` for the `call` of each layer, by `make(layer, call)`."""
    return replaced([(layer, "call", functools.partial(make, layer)) for layer in layers])


def freed_with(model):
    """Has the graph that is being traced for a model freed when the model goes.

    TensorFlow keeps the gradient of every `tf.custom_gradient` in a registry of the process, for
    ever, and by it the graph that called it: every step of Keras has one, in its optimiser.
    """
    if tf.inside_function():
        graph = weakref.ref(tf.compat.v1.get_default_graph())
        weakref.finalize(model, _forget_gradients, graph).atexit = False


def _forget_gradients(reference):
    graph = reference()
    registered = getattr(registry, "_registry", {})
    for operation in graph.get_operations() if graph is not None else ():
        name = operation.node_def.attr["_gradient_op_type"].s.decode()
        if name.startswith("CustomGradient-"):  # the others are TensorFlow's own
            registered.pop(name, None)


def set_silently(model, name, value):
    """Sets an attribute that Keras is not to track, save or look into."""
    object.__setattr__(model, name, value)


# Training


def compiled_loss(model):
    """The loss of `compile`, made anew by each; None where there is none."""
    return getattr(model, "_compile_loss", None)


def loss_of_batch(model, x, y, predictions, sample_weight, training):
    """What `compute_loss` gives, whether or not a model's own takes `training`."""
    return _part(model, "_compute_loss")(x, y, predictions, sample_weight, training=training)


def loss_tracker(model):
    """The metric that shows the loss, or None.

    `model.metrics` has it, but a model may override `metrics`.
    """
    return _part(model, "_loss_tracker")


def takes_training(model) -> bool:
    """Whether the model's `call` has an argument `training`."""
    return _part(model, "_call_has_training_arg")


def scaled_penalty(model, value):
    """A loss that is added to the data's, as Keras divides it among the replicas."""
    return _part(model, "_aggregate_additional_loss")(value)


def build_loss_and_metrics(model, batch):
    """Makes the variables of the compiled loss and metrics without a step."""
    _part(model, "_symbolic_build")(data_batch=batch)


TELLS_LAST_STEP = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 11)


def steps_of_execution(model, first: int, told: int) -> int:
    """How many steps were made, from what `on_train_batch_begin` and `_end` were told.

    Since Keras 3.11 the latter is told the last step of `steps_per_execution`, before that the
    first: then an epoch's last execution, which may have fewer, counts as whole.
    """
    return told - first + 1 if TELLS_LAST_STEP else model.steps_per_execution


def global_seed() -> int | None:
    """What `keras.utils.set_random_seed` was given; None where it is not known."""
    return get_random_seed() if get_random_seed is not None else None


def slots(optimizer, kind: str) -> list:
    """The state that an optimiser keeps for each variable.

    Args:
      kind: "momentums", "velocities", "velocity_hats" or "accumulators".
    """
    return list(_part(optimizer, f"_{kind}"))


# TensorFlow


def is_of_strategy(strategy, variable) -> bool:
    """Whether the variable was made in the strategy's scope."""
    return strategy.extended.variable_created_in_scope(variable.value)


def on_each_replica(strategy, action, arguments):
    """Runs an action on each replica, in their contexts."""
    strategy.extended.call_for_each_replica(action, args=arguments)


def onednn_is_on() -> bool | None:
    """Whether TensorFlow uses oneDNN; None where the release does not tell."""
    try:
        from tensorflow.python.util import _pywrap_util_port

        return bool(_pywrap_util_port.IsMklEnabled())
    except (ImportError, AttributeError):
        return None


@contextlib.contextmanager
def converters(by_op: dict):
    """While this is open, `tf.vectorized_map` vectorises these ops by these functions.

    Where a release has no such registry nothing happens: the ops are looped over.
    """
    registry = getattr(pfor, "_pfor_converter_registry", None)
    if registry is None:
        yield
        return
    saved = {name: registry.get(name) for name in by_op}
    registry.update(by_op)
    try:
        yield
    finally:
        for name, converter in saved.items():
            if converter is None:
                del registry[name]
            else:
                registry[name] = converter


def vectorised(value):
    """What a converter returns of a value that has an axis of examples."""
    return pfor.wrap(value, True)


def not_vectorised(why: str) -> Exception:
    """What a converter raises where it does not apply; the op is then looped over."""
    return pfor.ConversionNotImplementedError(why)


def operation_like(node, op_type: str, inputs) -> list:
    """The outputs of an operation with the attributes and output types of a converter's `node`."""
    dtypes = [output.dtype for output in node.outputs]
    return _part(pfor, "_create_op")(op_type, inputs, dtypes, attrs=node.op.node_def.attr).outputs
