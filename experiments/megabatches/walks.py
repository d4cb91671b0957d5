"""A learner's walk through the stages of a stream, from wherever it was interrupted."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import anytime, data, distributions, records, train, tree
from d2sparse.anytime import Journey
from d2sparse.data.budgets import shuffled
from d2sparse.masks import apply_masks
from d2sparse.train import Data, TrainState
from d2sparse.transforms import get_masks, set_masks
from d2sparse.tree import PyTree
from experiments import results, units
from experiments.megabatches.learners import Learner
from experiments.megabatches.options import Timetable
from experiments.megabatches.scoring import Scorer, Scoring, fresh_weights
from experiments.session import Session
from experiments.task import Task

_SAMPLE = 10  # Part of a seed, apart from those of `d2sparse.data.streams`.
_SCORE, _ANEW = 1, 2  # What a key of a stage is for.


class Stage(results.Finished):
    """What is told of a stage."""

    test_error: float
    train_accuracy: float
    validation_accuracy: float
    gap: float
    released_gap: float
    density: float
    layers: dict[str, float]
    seen: int


@dataclasses.dataclass(frozen=True)
class Walk:
    """One learner with one seed on its way.

    Attributes:
      task: what is learned.
      learner: what is trained.
      scorer: what it is pruned by.
      timetable: what it sees.
      job: its unit, and the data.
      session: trains, reports, saves.
      densities: part of the weights that is left at every stage, None for no pruning.
      fresh: a state of its own that nothing has been learned in.
    """

    task: Task
    learner: Learner
    scorer: Scorer
    timetable: Timetable
    job: units.Job
    session: Session
    densities: list[float | None]
    fresh: TrainState

    def arrive(self, stage: int, state: TrainState) -> TrainState:
        """What a new megabatch does to the network."""
        self.job.note(f"{self.job.unit.name}, megabatch {stage + 1}")
        if self.learner.anew:
            state = self._make(self._key(_ANEW, stage))._replace(step=state.step)
        left = self.densities[stage]
        return state if left is None else self._pruned(stage, state, left)

    def fit(self, journey: Journey, stop: int) -> TrainState:
        """An epoch on what is visible."""
        config, number = self.learner.config, int(journey.stage)
        stage = self.timetable.stages[number]
        schedule = config.schedule if self.learner.anneals else "constant"
        rate = anytime.stage_rate(
            schedule, config.learning_rate, int(journey.epoch), stage.epochs
        )
        settings = journey.state.settings | {"learning_rate": jnp.float32(rate)}
        examples = self.timetable.visible[number].train
        seed = (self.job.unit.seed, number)

        def indices(state: TrainState, steps: int) -> Any:
            start = int(state.step) - stage.begin
            return data.epoch_batches(examples, start, steps, config.batch_size, seed)

        return self.session.train(
            self.learner.run,
            journey.state._replace(settings=settings),
            self.job.splits.train,
            stop,
            lambda state: journey._replace(state=state),
            indices,
        )

    def validate(self, stage: int, state: TrainState) -> float:
        """Accuracy on what is held out; where nothing is, the last epoch wins."""
        held_out = self.timetable.visible[stage].validation
        if self.learner.config.select == "last" or not len(held_out):
            return float(state.step)
        return self._accuracy(state, self._take(held_out))

    def depart(self, stage: int, best: TrainState, state: TrainState) -> TrainState:
        """Measures the stage, and prepares the next."""
        if self.learner.prunes_within:
            best = _under(get_masks(state.opt_state), best)
        self.session.ledger.rounds.append(self._measured(stage, best))
        fresh = None if self.learner.config.carry_moments else self.fresh
        return anytime.go_on_from(best, state, fresh)

    def _make(self, key: jax.Array) -> TrainState:
        return self.learner.network.init(key, self.job.splits.train, {})

    def _key(self, purpose: int, stage: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.job.unit.seed), purpose)
        return jax.random.fold_in(key, stage)

    def _take(self, indices: np.ndarray) -> Data:
        return train.take(self.job.splits.train, jnp.asarray(indices))

    def _accuracy(self, state: TrainState, examples: Data) -> float:
        outputs = self.learner.network.predict(state, examples)
        return units.accuracy(next(iter(outputs.values())), examples)

    def _pruned(self, stage: int, state: TrainState, left: float) -> TrainState:
        config, masks = self.learner.config, get_masks(state.opt_state)
        weights_key, score_key = jax.random.split(self._key(_SCORE, stage))
        weights = state.params
        if config.score_weights == "fresh" and stage:
            weights = fresh_weights(weights, self.task, weights_key)
        found: Scoring = self.scorer(weights, masks, state, self._sample(stage))
        self.session.ledger.spent += found.macs / config.batch_size
        shares = {"global": distributions.global_, "leaf": distributions.uniform}
        masks = anytime.prune(
            masks,
            weights,
            1 - left,
            found.score,
            found.grads,
            config.dead,
            shares[config.scope],
            self.task.prunable,
            found.iterations,
            score_key,
        )
        return _under(masks, state)

    def _sample(self, stage: int) -> Data:
        """The examples that are scored on."""
        config, table = self.learner.config, self.timetable
        source = table.arrived if config.score_on == "new" else table.visible
        examples = source[stage].train
        if config.score_sample == "random":
            examples = shuffled(examples, (self.job.unit.seed, _SAMPLE, stage))
        return self._take(examples[: table.scored])

    def _measured(self, stage: int, best: TrainState) -> dict[str, Any]:
        """What is told of a stage."""
        found = units.judge(self.learner.network, best, self.job.splits)
        examples = self.timetable.visible[stage]
        clean = self._accuracy(best, self._take(examples.train))
        running = self.session.ledger.means.get("train_accuracy", float("nan"))
        held_out = (
            self._accuracy(best, self._take(examples.validation))
            if len(examples.validation)
            else float("nan")
        )
        layers = layer_densities(self.task, self.learner.masks(best))
        size = tree.size(tree.prunable_leaves(self.task.params, self.task.prunable))
        live = sum(number for number, _ in layers.values())
        return found | {
            "test_error": 1 - found["accuracy"],
            "train_accuracy": clean,
            "validation_accuracy": held_out,
            "gap": clean - found["accuracy"],
            "released_gap": running - held_out,
            "density": live / size,
            "layers": {path: number / of for path, (number, of) in layers.items()},
            "seen": len(np.unique(np.concatenate(self._arrived(stage)))),
            "training_macs": self.session.ledger.spent,
            "seconds": self.session.seconds,
        }

    def _arrived(self, stage: int) -> list[np.ndarray]:
        return [part for own in self.timetable.arrived[: stage + 1] for part in own]


def layer_densities(task: Task, masks: list[PyTree]) -> Mapping[str, tuple[int, int]]:
    """Live weights and size of every prunable leaf, over all networks of a learner."""
    kernels = tree.prunable_leaves(task.params, task.prunable)
    picked = [tree.pick(own, kernels) for own in masks]
    return {
        path: (sum(int(own[path].sum()) for own in picked), leaf.size)
        for path, leaf in kernels.items()
    }


def _under(masks: PyTree, state: TrainState) -> TrainState:
    """The state of one network, masked."""
    return state._replace(
        params=apply_masks(state.params, masks),
        opt_state=set_masks(state.opt_state, masks),
    )


def walk_unit(
    task: Task,
    learner: Learner,
    scorer: Scorer,
    timetable: Timetable,
    out: records.Run,
    job: units.Job,
    densities: list[float | None],
) -> None:
    """Trains one learner with one seed through the stream, and records every stage."""
    session = units.open_session(learner.config, out, learner.network, job)
    key = jax.random.key(job.unit.seed)
    fresh = learner.network.init(key, job.splits.train, {})
    walk = Walk(
        task,
        learner,
        scorer,
        timetable,
        job,
        session,
        densities,
        jax.tree.map(jnp.copy, fresh),
    )
    journey = session.begin(
        lambda: anytime.begin_journey(fresh), lambda journey: journey.state
    )
    try:
        anytime.learn_stream(
            journey,
            timetable.stages,
            walk.arrive,
            walk.fit,
            walk.validate,
            walk.depart,
        )
    except FloatingPointError as error:
        out.fail(job.unit, str(error))
        return
    finally:
        session.wait()
    out.finish(job.unit, {"stages": session.ledger.rounds})
