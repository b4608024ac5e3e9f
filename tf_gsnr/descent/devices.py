"""Full-batch descent of one model on many devices, each with its share of the training set.

The weights are plain tensors, the same everywhere. In each step every device adds up the gradients
of its micro-batches, and the sums over the devices are the step's: the loop over the steps is in
the graph and around the devices. Several processes go through the same program; what depends on a
clock (how many steps are made at a time, when a checkpoint is written) they must do alike, or they
wait for each other forever.

"Replica" is TensorFlow's word here: a device's part of the computation.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time

import numpy as np
import tensorflow as tf

from tf_gsnr.descent import microbatches
from tf_gsnr.descent import single as descent
from tf_gsnr.gradients import distributed, network

STRATEGIES = ("mirrored", "multi_worker")


def strategy(name: str, available):
    """The strategy of this name; to be made before anything else of TensorFlow runs.

    Args:
      name: "mirrored", all devices of this machine; "multi_worker", those of all processes that the
        environment variable TF_CONFIG names.
      available: those of `STRATEGIES` that the experiment runs under.

    Raises:
      ValueError: another experiment's, or no TF_CONFIG.
    """
    if name not in available:
        raise ValueError(
            f"--strategy={name}: this experiment measures a configuration on one device; "
            f"available: {', '.join(['none', *available])}. Several devices or machines share out "
            "its configurations by --shard=i/k"
        )
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if not os.environ.get("TF_CONFIG"):
        raise ValueError(
            "--strategy=multi_worker: TF_CONFIG is not set; expected the cluster and this "
            'process\'s place in it, such as TF_CONFIG=\'{"cluster": {"worker": ["host0:12345", '
            '"host1:12345"]}, "task": {"type": "worker", "index": 0}}\' (devices of this machine '
            "alone: --strategy=mirrored)"
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def worker(strategy) -> int:
    """The number of this process among those of the strategy, 0 for the chief."""
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or resolver.task_type == "chief":
        return 0
    chiefs = resolver.cluster_spec().as_dict().get("chief", [])
    return len(chiefs) + (resolver.task_id or 0)


def build(model, loss, learning_rate: float, strategy, *, engine="auto", jit_compile=False):
    """`descent.build_ensemble` of one model, M = 1, on the devices of a strategy.

    Training sets are what `share` makes of them. Losses on a data set that is not shared out are
    computed in each process by one of its devices.

    Returns:
      `descent.Ensemble`.

    Raises:
      ValueError: a model with batch normalisation.
    """
    if network.all_batch_norms(model):
        raise ValueError(
            f"model {model.name!r} has batch normalisation, whose statistics are those of the "
            "whole training set: it must be on one device. Expected --strategy=none; --shard=i/k "
            "shares out configurations instead"
        )
    single = descent.build_ensemble(
        model, loss, learning_rate, 1, engine=engine, jit_compile=jit_compile
    )
    of_microbatch = microbatches.of_microbatch(model, loss, engine)
    compiled = functools.partial(tf.function, autograph=False)

    def on_all(of_share, reduce, weights, own):
        """`reduce` over the replicas of `of_share` of each one's."""
        found = strategy.run(lambda *a: reduce(of_share(*a)), args=(weights, *own))
        return distributed.first(strategy, found)

    def counted(function):
        """A share's number of examples and sum of `function`."""

        def of_share(weights, x, y, valid):
            n = tf.math.count_nonzero(valid, dtype=tf.float64)
            return n, microbatches.over(function, microbatches.plus, weights, x, y, valid)

        return compiled(of_share, jit_compile=jit_compile)

    gradient_sums, loss_sum = counted(of_microbatch.gradient), counted(of_microbatch.loss)

    @functools.partial(compiled, jit_compile=jit_compile)
    def moments_of_share(weights, x, y, valid):
        return microbatches.over(of_microbatch.moments, microbatches.merge, weights, x, y, valid)

    @compiled
    def descend(weights, own, steps, last_loss):
        def mean_gradient(weights):
            n, sums = on_all(gradient_sums, _summed, weights, own)
            return microbatches.divided(sums, n)

        return descent.loop(mean_gradient, single.step, weights, last_loss, steps)

    @compiled
    def moments(weights, own):
        return on_all(moments_of_share, distributed.all_reduce, weights, own)

    @compiled
    def mean_loss(weights, own):
        n, loss = on_all(loss_sum, _summed, weights, own)
        return loss / n

    return single._replace(
        descend=lambda weights, own, *rest: descend(_tensors(weights), own, *rest),
        moments=lambda weights, own: moments(_tensors(weights), own),
        loss=lambda weights, own: mean_loss(_tensors(weights), own),
    )


def _tensors(weights):
    return [tf.convert_to_tensor(w) for w in weights]


def _summed(values):
    """Nested tensors, over the replicas."""
    sums = distributed.sum_over_replicas(tf.nest.flatten(values))
    return tf.nest.pack_sequence_as(values, sums)


def share(strategy, own):
    """A training set's micro-batches, shared out over the replicas.

    Args:
      own: `(x, y, valid)` with axes `[1, micro-batches, batch]`; `valid` without the first.

    Returns:
      The same, of each replica as many micro-batches; what is added at the end is not valid.
    """
    x, y, valid = own
    size = -(-len(valid) // strategy.num_replicas_in_sync)

    def of_replica(context):
        places = context.replica_id_in_sync_group * size + np.arange(size)
        there = np.minimum(places, len(valid) - 1)
        mine = tf.gather(valid, there) & (places < len(valid))[:, np.newaxis]
        return [tf.gather(x, there, axis=1), tf.gather(y, there, axis=1), mine]

    return tuple(strategy.experimental_distribute_values_from_function(of_replica))


def clock(strategy):
    """A function that tells the time in seconds, the same in all processes that ask together."""

    def now():
        times = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(time.monotonic(), tf.float64)
        )
        return float(strategy.reduce(tf.distribute.ReduceOp.MEAN, times, axis=None))

    return now


def check_same_start(strategy, place, path):
    """Checks that all processes are about to do the same.

    Args:
      place: values of JSON: where this process is.
      path: of its run directory, for the message.

    Raises:
      ValueError: in all processes, where one of them is elsewhere.
    """
    text = json.dumps(place, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.int64)[np.newaxis]
    digests = strategy.experimental_distribute_values_from_function(lambda _: tf.constant(digest))
    gathered = strategy.gather(digests, axis=0).numpy()
    if (gathered != gathered[0]).any():
        raise ValueError(
            f"the processes of --strategy=multi_worker do not start from the same place: {path} "
            "and the other processes' run directories differ in their flags or in what they have "
            "measured. Copy the chief's directory over those of the workers, or remove all of them "
            "(--overwrite, in each process)"
        )
