"""The classes of a network stand for those of another task, by a label map."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import label_maps
from d2sparse.checks import check_choice, check_whole
from d2sparse.models import Model
from d2sparse.train import (
    Constraint,
    Data,
    Phase,
    Program,
    Progress,
    Settings,
    Training,
    TrainState,
    claim,
    passes,
    stay,
    take,
)
from d2sparse.tree import PyTree

KINDS = ("random", "identity", "frequency", "iterative")
_SOLVERS = {"greedy": label_maps.greedy, "hungarian": label_maps.hungarian}


class Mapped(NamedTuple):
    """Model state of a network whose outputs are mapped.

    Attributes:
      own: what the network's forward pass changes.
      mapping: int32[K], the source class of every target class; None for the outputs of
        the source.
    """

    own: PyTree
    mapping: jax.Array | None


def label_mapped(
    classes: int,
    kind: str = "iterative",
    every: int | None = None,
    *,
    soft: bool = False,
    solver: str = "greedy",
    final_refresh: bool = True,
) -> Constraint:
    """A network predicts K classes by K of its S outputs: `z[:, mapping]`.

    The map is in the model state, is not trained, and is

    * "random": the first K of a permutation, drawn for every run;
    * "identity": class k is source class k;
    * "frequency": chosen by votes before the first step, see `d2sparse.label_maps`;
    * "iterative": chosen anew at the beginning of every phase and at every multiple of
      `every` steps, from the votes of the prompt and the network as they are then (Chen
      et al., arXiv 2211.11635, whose interval is an epoch).

    All training examples vote, in evaluation mode; on a stream, those that the phase is
    trained on. Put it last where votes choose the map; to pair networks or make an
    ensemble, put "identity" or "random" before that, and `remapped` last.

    Args:
      classes: K, of the target.
      kind: of the map, one of the four.
      every: steps between two choices of an iterative map.
      soft: whether votes are probabilities.
      solver: "greedy" or "hungarian".
      final_refresh: whether what counts at the end has a map of its own, of an
        iterative map; without, it is that of the last interval's start.

    Raises:
      ValueError: an unknown name, or `every` where nothing is iterative; when a run
        begins, where a later constraint has replaced the phases that choose the map, or
        the source has fewer classes.
    """
    check_whole("classes", classes, least=1)
    check_choice("kind", kind, KINDS)
    check_choice("solver", solver, _SOLVERS)
    if (every is None) == (kind == "iterative"):
        raise ValueError(
            "expected steps between two choices, `every`, of an iterative map and of "
            f"no other, got kind={kind!r} and every={every}"
        )
    is_chosen = kind in ("frequency", "iterative")
    refresh = remapped(
        classes,
        every,
        soft=soft,
        solver=solver,
        final_refresh=final_refresh and kind == "iterative",
    )

    def constrained(training: Training) -> Training:
        claimed = claim(training, "the labels", "label_mapped")
        model = with_map(training.model, classes, is_random=kind == "random")
        mapped = claimed._replace(model=model)
        return _guarded(refresh(mapped)) if is_chosen else mapped

    return constrained


def remapped(
    classes: int,
    every: int | None = None,
    *,
    soft: bool = False,
    solver: str = "greedy",
    final_refresh: bool = True,
) -> Constraint:
    """Maps of a `label_mapped` network, or of several, are chosen by votes.

    The part of `label_mapped` that goes last: after what pairs networks, each of which
    then has its own map, after iterative pruning, and after a stream.

    Args:
      classes: K, of the target.
      every: steps between two choices; None for one before the first step.
      soft: whether votes are probabilities.
      solver: "greedy" or "hungarian".
      final_refresh: whether what counts at the end has a map of its own.

    Raises:
      ValueError: when applied, where no outputs are mapped, the maps are chosen
        already, or the training hands over to another one.
    """
    check_choice("solver", solver, _SOLVERS)
    if every is not None:
        check_whole("every", every, least=1)

    def constrained(training: Training) -> Training:
        _refuse(training)
        chosen = claim(training, "the choice of labels", "remapped")

        def choose(
            program: Program, state: TrainState, data: Data, voters: Any
        ) -> TrainState:
            own = program.training
            count = vote_counter(own.model.apply, own.inputs, classes, soft)
            found = count(state.params, state.model_state, data, voters)
            maps = [_solve(solver)(votes) for votes in found]
            return state._replace(model_state=with_maps(state.model_state, maps))

        partial = any(phase.batches is not None for phase in training.phases)

        def begin(progress: Progress, data: Data) -> Progress:
            progress = training.begin(progress, data)
            if not partial:
                return progress
            voters = jnp.ones(len(data.labels), bool)
            return progress._replace(memory={**progress.memory, "voters": voters})

        def finish(progress: Progress, data: Data, program: Program) -> TrainState:
            state = training.finish(progress, data, program)
            if not final_refresh:
                return state
            return choose(program, state, data, progress.memory.get("voters"))

        phases = _phases(training.phases, every, choose)
        return chosen._replace(begin=begin, finish=finish, phases=tuple(phases))

    return constrained


def with_map(model: Model, classes: int, is_random: bool = False) -> Model:
    """A network whose model state is `Mapped`, with outputs of the target's classes.

    Args:
      model: the source network, whose outputs are `float[batch, S]`.
      classes: K, at most S.
      is_random: whether the first map is drawn, instead of the identity.
    """

    def init(key: jax.Array, x: Any) -> tuple[PyTree, Mapped]:
        params, own = model.init(key, x)

        def logits(params: PyTree, own: PyTree, x: Any) -> Any:
            return model.apply(params, own, x, train=False)[0]

        outputs = jax.eval_shape(logits, params, own, x)
        if not hasattr(outputs, "shape") or len(outputs.shape) != 2:
            raise ValueError(
                "expected logits of shape (batch, source classes) to map, got "
                f"{outputs}; put label_mapped before what pairs networks"
            )
        label_maps.check_enough(outputs.shape[1], classes)
        mapping = label_maps.identity_map(classes)
        if is_random:
            map_key = jax.random.fold_in(key, 1)
            mapping = label_maps.random_map(map_key, outputs.shape[1], classes)
        return params, Mapped(own, mapping)

    def apply(
        params: PyTree, model_state: Mapped, x: Any, *, train: bool
    ) -> tuple[jax.Array, Mapped]:
        own, mapping = model_state
        logits, after = model.apply(params, own, x, train=train)
        if mapping is not None:
            logits = label_maps.map_logits(logits, mapping)
        return logits, Mapped(after, mapping)

    return Model(init, apply)


def maps_of(model_state: PyTree) -> list[jax.Array]:
    """The maps in a model state: of one network, or of several."""
    leaves = jax.tree.leaves(model_state, is_leaf=_is_mapped)
    return [leaf.mapping for leaf in leaves if _is_mapped(leaf)]


def with_maps(model_state: PyTree, maps: list[Any]) -> PyTree:
    """A model state with its first maps replaced; others are those of teachers."""
    left: Iterator[Any] = iter(maps)

    def replaced(node: Any) -> Any:
        if not _is_mapped(node):
            return node
        return node._replace(mapping=next(left, node.mapping))

    return jax.tree.map(replaced, model_state, is_leaf=_is_mapped)


Choose = Callable[[Program, TrainState, Data, Any], TrainState]


@dataclasses.dataclass(frozen=True)
class _Choosing:
    """Enters a phase, and then chooses the maps from the votes of its examples."""

    phase: Phase
    choose: Choose

    def __call__(self, progress: Progress, data: Data, program: Program) -> Progress:
        progress = self.phase.enter(progress, data, program)
        steps = self.phase.stop - int(progress.state.step)
        if steps <= 0:
            return progress
        voters = None
        if "voters" in progress.memory:
            voters = jnp.asarray(self._voters(progress, data, steps))
            memory = {**progress.memory, "voters": voters}
            progress = progress._replace(memory=memory)
        state = self.choose(program, progress.state, data, voters)
        return progress._replace(state=state)

    def _voters(self, progress: Progress, data: Data, steps: int) -> np.ndarray:
        if self.phase.batches is None:
            return np.ones(len(data.labels), bool)
        rows = np.asarray(self.phase.batches(progress, data, steps))
        return np.isin(np.arange(len(data.labels)), rows)


def _phases(
    phases: tuple[Phase, ...], every: int | None, choose: Choose
) -> Iterator[Phase]:
    """The phases, cut where maps are chosen anew."""
    before = 0
    for number, phase in enumerate(phases):
        # A phase that ends where the one before it does has gone back to begin with.
        start = before if phase.stop > before else 0
        before = phase.stop
        if every is None:
            chooses = number == 0
            yield phase._replace(enter=_Choosing(phase, choose)) if chooses else phase
            continue
        inside = range((start // every + 1) * every, phase.stop, every)
        stops = [*inside, phase.stop]
        for part, stop in enumerate(stops):
            own = phase._replace(stop=stop)
            if part:
                own = own._replace(enter=stay)
            title = phase.title if stop == phase.stop else ""
            yield own._replace(enter=_Choosing(own, choose), title=title)


@functools.lru_cache(maxsize=16)
def vote_counter(
    apply: Callable[..., Any],
    inputs: Callable[[Data, Any], Any],
    classes: int,
    soft: bool,
) -> Callable[..., list[jax.Array]]:
    """Counts what examples vote for; compiled once for a training.

    Args:
      apply: of the model whose outputs are mapped.
      inputs: of its training.
      classes: K, of the target.
      soft: whether votes are probabilities.

    Returns:
      `(params, model_state, data, voters) -> votes`, `[S, K]` of every network; voters
      are bool[n], or None for all.
    """

    @jax.jit
    def votes(
        params: PyTree, model_state: PyTree, batch: Data, weight: jax.Array
    ) -> list[jax.Array]:
        source = with_maps(model_state, [None] * len(maps_of(model_state)))
        x = inputs(batch, None)
        outputs, _ = apply(params, source, x, train=False)
        count = functools.partial(
            label_maps.votes, classes=classes, soft=soft, weight=weight
        )
        return [count(logits, batch.labels) for logits in jax.tree.leaves(outputs)]

    def counted(
        params: PyTree, model_state: PyTree, data: Data, voters: jax.Array | None
    ) -> list[jax.Array]:
        total = None
        for rows, counts in passes(len(data.labels)):
            weight = jnp.asarray(counts)
            if voters is not None:
                weight &= voters[rows]
            batch = take(data, jnp.asarray(rows))
            found = votes(params, model_state, batch, weight)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        assert total is not None
        return total

    return counted


@functools.cache
def _solve(solver: str) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_SOLVERS[solver])


def _guarded(training: Training) -> Training:
    """Refuses to begin where a later constraint has replaced the phases that choose."""

    def init(
        outer: Training, key: jax.Array, data: Data, settings: Settings
    ) -> TrainState:
        own = [p for p in outer.phases if p.training is None or p.training is outer]
        if own and not isinstance(own[0].enter, _Choosing):
            raise ValueError(
                "expected label_mapped after what decides the phases of a training, "
                "got it before; put it last, or remapped after a map that is given"
            )
        return training.init(outer, key, data, settings)

    return training._replace(init=init)


def _refuse(training: Training) -> None:
    if "the labels" not in training.claims:
        raise ValueError(
            "expected a network whose outputs are mapped, got none; put "
            'label_mapped(classes, "identity") before remapped'
        )
    if any(phase.training is not None for phase in training.phases):
        raise ValueError(
            "expected a training of one network or of several together, got one that "
            "hands over to another; label maps of such trainings are not chosen by "
            "votes: take a random map or the identity"
        )


def _is_mapped(node: Any) -> bool:
    return isinstance(node, Mapped)
