"""Comparisons of source networks on another task: ways made from flags, results."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import label_maps, metrics
from d2sparse.checks import optional
from d2sparse.constraints import (
    TRANSFER_METHODS,
    Method,
    TransferOptions,
    Transferred,
    make_prompt,
    maps_of,
    vote_counter,
)
from d2sparse.constraints.equal_costs import Known
from d2sparse.data import Source
from d2sparse.models import Model
from d2sparse.models.pretrained import Pretrained
from d2sparse.prompts.images import resized, with_channels
from d2sparse.study import transfer_report
from d2sparse.study.comparing import Experiment, compare
from d2sparse.study.flags import as_axes, options_of
from d2sparse.study.grid import Row
from d2sparse.study.runner import End
from d2sparse.study.sources import (
    COMPRESSIONS,
    FLOAT_BITS,
    Workshop,
    make_workshop,
)
from d2sparse.train import Data, Training, constrain, passes, take

with optional(__name__):
    import pandas as pd

RELEASED_BATCH = 128  # That prompts were evaluated with by the published code.
# What only says where runs start: rows that differ in it alone share a program.
STARTS = ("compression", "source_seed")
_PROMPTED = ("prompt", "prompt_size", "prompt_rate")
_VOTES = ("votes", "solver")
_CHOSEN = ("prompted_frequency", "prompted_iterative")  # Whose maps votes choose.
_READS: Mapping[str, tuple[str, ...]] = {
    "prompted_random": _PROMPTED,
    "prompted_identity": _PROMPTED,
    "prompted_frequency": (*_PROMPTED, *_VOTES),
    "prompted_iterative": (*_PROMPTED, *_VOTES, "map_every", "final_refresh"),
    "probed": ("probe_rate",),
    "fine_tuned": ("tuning_rate",),
}


def transfer(config: Any, target: Source) -> "pd.DataFrame":
    """Makes the source networks, puts each on the target in every way, and reports.

    Args:
      config: flags, of `study.Config`, `SourceFlags` and `TransferOptions` together.
      target: the task.

    Returns:
      A row a run.

    Raises:
      ValueError: something in the configuration cannot be done.
    """
    config = as_axes(config, (*STARTS, "samples_per_class"))
    say = print if config.progress else (lambda text: None)
    workshop = make_workshop(config, config.data_dir, not config.dry_run, say)
    like = workshop.start(config.source_seed)
    _check_prompts(config, like, target.num_classes)
    experiment = Experiment(
        "transfer",
        methods=transfer_methods(workshop, target.num_classes),
        values=further_flags,
        starts=STARTS,
        examine=lambda end: transfer_results(end, workshop),
        report=transfer_report.report,
    )
    return compare(config, experiment, target, _placeholder(like))


def _check_prompts(config: Any, network: Pretrained, classes: int) -> None:
    """Refuses prompts and maps that the network has no room for.

    They would be found where they are made, after source networks have been trained.
    """
    if not any(name.startswith("prompted") for name in config.methods):
        return
    images = jax.ShapeDtypeStruct((1, *network.shape), jnp.float32)
    apply = functools.partial(network.model.apply, train=False)
    logits, _ = jax.eval_shape(apply, network.params, network.model_state, images)
    label_maps.check_enough(logits.shape[-1], classes)
    kinds = config.axes.get("prompt", (config.prompt,))
    sizes = config.axes.get("prompt_size", (config.prompt_size,))
    for kind, size in itertools.product(kinds, sizes):
        make_prompt(network, TransferOptions(prompt=kind, prompt_size=size))


def _placeholder(network: Pretrained) -> Model:
    """A network of the source's size, for images of any; it is never trained."""
    like = jnp.zeros((1, *network.shape))

    def init(key: jax.Array, x: Any) -> Any:
        return network.model.init(key, like)

    def apply(params: Any, model_state: Any, x: Any, *, train: bool) -> Any:
        seen = with_channels(resized(x, network.shape[:2]), network.shape[2])
        return network.model.apply(params, model_state, seen, train=train)

    return Model(init, apply)


def transfer_methods(workshop: Workshop, classes: int) -> dict[str, Method]:
    """TRANSFER_METHODS as they are made from flags.

    Args:
      workshop: makes the source networks that flags name.
      classes: of the target.
    """
    return {
        name: method._replace(constraints=_from_flags(name, method, workshop, classes))
        for name, method in TRANSFER_METHODS.items()
    }


def further_flags(row: Row, base: Known) -> dict[str, Any]:
    """Flags that tell rows apart which cannot share a program."""
    flags: Any = base.flags
    own = COMPRESSIONS[flags.compression]
    found = {"activation_bits": own.activation_bits}
    if row.method == "fine_tuned" and own.bits:
        found["bits"] = own.bits
    return found


def transfer_results(end: End, workshop: Workshop) -> dict[str, Any]:
    """What is recorded of a run besides its quality and its costs.

    Returns:
      signed_gap, ece_mass and released_ece of the judged examples; temperature, fitted
      on training examples outside of the labels, and nll_scaled and ece_scaled with it
      (NaN where there are none); unvoted, target classes whose source class nobody
      voted for (NaN without a map that votes choose); of the source network, source_
      accuracy, source_nll, source_ece, source_sparsity, source_bits and source_size.
    """
    flags: Any = end.plan.config
    judge, held_out = end.splits.judge, end.splits.monitor
    logits = _outputs(end, judge)
    quality = _calibration(logits, judge.labels)
    scaled = dict.fromkeys(("temperature", "nll_scaled", "ece_scaled"), np.nan)
    if held_out is not None:
        known = _outputs(end, held_out), held_out.labels
        scaled = _at_temperature(logits, judge.labels, *known)
    source, votes = workshop.make(flags.compression, flags.source_seed), _votes(end)
    return {
        **{name: float(value) for name, value in {**quality, **scaled}.items()},
        "unvoted": _unvoted(end, votes),
        **{f"source_{name}": value for name, value in source.facts.items()},
        "source_bits": source.compression.bits or FLOAT_BITS,
        **(_picture(end, logits, scaled, votes) if _is_first(end) else {}),
    }


def _is_first(end: End) -> bool:
    """Whether it is the run of its way and compression that is drawn."""
    flags: Any = end.plan.config
    return bool(end.seed == 0 and flags.source_seed == 0)


def _picture(
    end: End, logits: jax.Array, scaled: Mapping[str, Any], votes: jax.Array | None
) -> dict[str, Any]:
    """What figures show of a run: reliability, and of a prompt its pixels and votes."""
    labels = end.splits.judge.labels
    warmth = {"before": 1.0, "after": float(scaled["temperature"])}
    found: dict[str, Any] = {
        f"reliability_{name}": _as_lists(
            metrics.calibration(metrics.soften(logits, own), labels)
        )
        for name, own in warmth.items()
        if np.isfinite(own)
    }
    if votes is not None:
        drawn = {"prompt": end.state.params["prompt"], "map": _map_of(end)}
        found |= _as_lists({**drawn, "votes": votes})
    return found


def _as_lists(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(values).tolist() for name, values in arrays.items()}


@jax.jit
def _calibration(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    probabilities = jax.nn.softmax(logits)
    return {
        "signed_gap": metrics.signed_gap(probabilities, labels),
        "ece_mass": metrics.ece(probabilities, labels, scheme="mass"),
        "released_ece": metrics.released_ece(logits, labels, RELEASED_BATCH),
    }


@jax.jit
def _at_temperature(
    logits: jax.Array, labels: jax.Array, held_out: jax.Array, held_labels: jax.Array
) -> dict[str, jax.Array]:
    found = metrics.fit_temperature(held_out, held_labels)
    probabilities = metrics.soften(logits, found)
    return {
        "temperature": found,
        "nll_scaled": metrics.nll(probabilities, labels),
        "ece_scaled": metrics.ece(probabilities, labels),
    }


def _votes(end: End) -> jax.Array | None:
    """What training examples vote for at the end, [S, K]; None where nobody asks."""
    is_asked = end.plan.row.method in _CHOSEN or _is_first(end)
    if "prompt" not in end.state.params or not is_asked:
        return None
    flags: Any = end.plan.config
    own, state, soft = end.program.training, end.state, flags.votes == "soft"
    count = vote_counter(own.model.apply, own.inputs, len(_map_of(end)), soft)
    (votes,) = count(state.params, state.model_state, end.splits.train, None)
    return votes


def _map_of(end: End) -> jax.Array:
    (mapping,) = maps_of(end.state.model_state)
    return mapping


def _unvoted(end: End, votes: jax.Array | None) -> float:
    if votes is None or end.plan.row.method not in _CHOSEN:
        return np.nan
    return float(label_maps.unvoted(votes, _map_of(end)))


def _from_flags(
    name: str, method: Method, workshop: Workshop, classes: int
) -> Callable[[Any], tuple[Any, ...]]:
    def constraints(flags: Any) -> tuple[Any, ...]:
        for flag in (*STARTS, *_READS[name]):
            getattr(flags, flag)  # Which `flags_used` watches.

        def on_target(training: Training) -> Training:
            source = workshop.make(flags.compression, flags.source_seed)
            given = Transferred(
                source.network,
                classes,
                training.horizon,
                options_of(TransferOptions, flags),
                source.compression.bits,
            )
            return constrain(training, *method.constraints(given))

        return (on_target,)

    return constraints


def _outputs(end: End, examples: Data) -> jax.Array:
    """Logits of a set in evaluation mode, float32[n, outputs]."""
    own, state, size = end.program.training, end.state, len(examples.labels)
    forward = _forward(own.model.apply, own.inputs)
    parts = [
        forward(state.params, state.model_state, examples, rows)
        for rows, _ in passes(size)
    ]
    return jnp.asarray(np.concatenate(jax.device_get(parts))[:size])


@functools.lru_cache(maxsize=16)
def _forward(apply: Any, inputs: Any) -> Callable[..., jax.Array]:
    """`(params, model_state, examples, rows) -> logits`, compiled once a training."""

    def logits(params: Any, model_state: Any, examples: Data, rows: Any) -> jax.Array:
        x = inputs(take(examples, rows), None)
        found: jax.Array = apply(params, model_state, x, train=False)[0]
        return found.astype(jnp.float32)

    return jax.jit(logits)
