"""Gates in the model state: activation functions and blocks that can be switched off.

A gate is data. Where it is closed the identity takes the place of an activation
function, or of a block whose output has the shape of its input; a new value compiles
nothing. Both are computed all the same: that saves no time until layers are merged
(`d2sparse.surgery`) or the network is written without them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.tracers import current_trace

from d2sparse import tree
from d2sparse.models.base import Model
from d2sparse.models.layers import ReLU
from d2sparse.models.taps import Tap, replace
from d2sparse.tree import PyTree


class Gates(NamedTuple):
    """What of a network is as it was written.

    Attributes:
      active: by activation function, bool[]: whether it is applied; else it is linear.
      open: by activation function, bool[channels]: of one that is linear, the channels
        that are let through; the others are 0.
      blocks: by block, bool[]: whether it is applied; else it is the identity.
    """

    active: dict[str, jax.Array]
    open: dict[str, jax.Array]
    blocks: dict[str, jax.Array]


class Gated(NamedTuple):
    """The model state of a network with gates.

    Attributes:
      own: that of the network.
      gates: which layers are applied.
    """

    own: PyTree
    gates: Gates


class Activation(NamedTuple):
    """What an activation function is applied to.

    Attributes:
      channels: size of the last axis.
      norm: the batch normalisation whose output it is given as it is; empty where
        something stands between them, such as the sum with a shortcut.
      kernels: layers with a kernel in the same module that are applied after the
        activation function before it: those that feed it.
    """

    channels: int
    norm: str
    kernels: tuple[str, ...]


class Layers(NamedTuple):
    """The layers of a network that may be left out, in the order of application.

    Attributes:
      activations: activation functions: modules without parameters that keep the shape.
        Functions that are no modules cannot be seen, nor modules applied twice.
      blocks: modules around kernels whose output has the shape of their input; of one
        in another, the inner one.
    """

    activations: dict[str, Activation]
    blocks: tuple[str, ...]


class _Call(NamedTuple):
    """A module that has been applied; what it was given and returned is traced."""

    path: str
    tap: Tap
    has_kernel: bool
    is_norm: bool
    is_activation: bool

    @property
    def parent(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def keeps_shape(self) -> bool:
        x, y = self.tap
        shapes = getattr(x, "shape", None), getattr(y, "shape", ())
        return shapes[0] == shapes[1] and x.dtype == y.dtype


def find_layers(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Layers:
    """Finds the activation functions and blocks of a network; nothing is computed.

    Args:
      apply: any function that applies Linen modules, such as `Model.apply`.
      *args: its arguments; shapes are enough.
      **kwargs: arguments that are not traced, such as `train=False`.

    Returns:
      Both, empty for a network that is not made of Linen modules.

    >>> from d2sparse import models
    >>> model, x = models.resnet20(), jnp.ones((1, 8, 8, 3))
    >>> params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> layers = find_layers(model.apply, params, state, x, train=False)
    >>> len(layers.activations), layers.activations["stem_relu"].norm, layers.blocks[3]
    (19, 'stem_norm', 'stage2_block2')
    """
    calls: list[_Call] = []
    here: list[Any] = []

    def intercept(
        layer: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        result = layer(*args, **kwargs)
        is_rehearsal = current_trace() != here[0]  # Such as `jax.eval_shape` inside.
        if context.method_name == "__call__" and args and not is_rehearsal:
            calls.append(_call(context.module, Tap(args[0], result)))
        return result

    def traced(*args: Any) -> None:
        here.append(current_trace())
        with nn.intercept_methods(intercept):
            apply(*args, **kwargs)

    jax.eval_shape(traced, *args)
    times = Counter(call.path for call in calls)
    once = [call for call in calls if times[call.path] == 1]
    return Layers(_activations(once), _blocks(once))


def gated(model: Model, check: Callable[[Layers], None] | None = None) -> Model:
    """A network whose activation functions and blocks have gates in its model state.

    All of them are open when it is initialised; the model state is a `Gated`. They are
    found when it is initialised, from the network itself. Networks inside of `nn.scan`
    or with a module that is applied twice have no gates there.

    Args:
      model: of Linen modules; its parameters stay the same.
      check: raises where the layers that there are do not do.

    Returns:
      The model. `init` raises a `ValueError` if there is nothing that could be gated.

    >>> from d2sparse import models
    >>> model, x = gated(models.lenet_300_100(num_classes=3)), jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> list(state.gates.active), state.gates.open["relu2"].shape
    (['relu1', 'relu2'], (100,))
    >>> linear = state._replace(gates=linearised(state.gates, "relu1"))
    >>> logits, _ = model.apply(params, linear, x, train=False)
    """

    def init(key: jax.Array, x: Any) -> tuple[PyTree, PyTree]:
        params, own = model.init(key, x)
        layers = find_layers(model.apply, params, own, x, train=False)
        if not layers.activations and not layers.blocks:
            raise ValueError(
                "expected a network with activation functions that are Linen modules, "
                "such as models.layers.ReLU, or blocks that keep the shape of their "
                "input, got neither; make them modules that are applied once"
            )
        if check is not None:
            check(layers)
        return params, Gated(own, _open_gates(layers))

    def apply(
        params: PyTree, model_state: Gated, x: Any, *, train: bool
    ) -> tuple[Any, PyTree]:
        own, gates = model_state
        outputs = {
            path: functools.partial(_activate, active, gates.open[path])
            for path, active in gates.active.items()
        } | {path: functools.partial(_pass, on) for path, on in gates.blocks.items()}
        result, after = replace(model.apply, outputs)(params, own, x, train=train)
        return result, Gated(after, gates)

    return Model(init, apply)


def linearised(gates: Gates, path: str, channels: Any = None) -> Gates:
    """Gates with the identity in place of an activation function.

    Args:
      gates: those before.
      path: of the activation function.
      channels: bool[channels], which it lets through, the others being 0; all if not
        given.
    """
    given = jnp.asarray(gates.open[path] if channels is None else channels, bool)
    off = jnp.zeros_like(gates.active[path])
    return gates._replace(
        active={**gates.active, path: off}, open={**gates.open, path: given}
    )


def dropped(gates: Gates, path: str) -> Gates:
    """Gates with the identity in place of a block."""
    off = jnp.zeros_like(gates.blocks[path])
    return gates._replace(blocks={**gates.blocks, path: off})


def get_gates(model_state: Any) -> Gates:
    """The gates in a model state, however deep it is wrapped."""
    inner = model_state
    while not isinstance(inner, Gated):
        inner = inner.own
    return inner.gates


def set_gates(model_state: Any, gates: Gates) -> Any:
    """The model state with other gates."""
    if isinstance(model_state, Gated):
        return model_state._replace(gates=gates)
    return model_state._replace(own=set_gates(model_state.own, gates))


def remaining(gates: Mapping[str, jax.Array]) -> list[str]:
    """Paths of the gates that are not closed, on the host.

    >>> remaining({"relu1": jnp.array(True), "relu2": jnp.array(False)})
    ['relu1']
    """
    return [path for path, gate in jax.device_get(dict(gates)).items() if gate]


def leaf_of(params: PyTree, layer: str, name: str) -> str:
    """The path of a parameter of a layer as taps name it.

    It is longer where something else has parameters beside the network, as a prompt.

    >>> leaf_of({"network": {"head": {"kernel": 0}}}, "head", "kernel")
    'network/head/kernel'
    """
    own = f"{layer}/{name}"
    paths = [p for p in tree.flatten(params) if f"/{p}".endswith(f"/{own}")]
    return min(paths, key=len)


def _call(module: nn.Module, tap: Tap) -> _Call:
    has_kernel = module.has_variable("params", "kernel")
    scaled = all(module.has_variable("params", name) for name in ("scale", "bias"))
    has_variables = bool(jax.tree.leaves(dict(module.variables)))
    return _Call(
        "/".join(module.path),
        tap,
        has_kernel,
        scaled and module.has_variable("batch_stats", "mean"),
        isinstance(module, ReLU)
        or not (has_variables or isinstance(module, nn.Dropout)),
    )


def _activations(calls: list[_Call]) -> dict[str, Activation]:
    found: dict[str, Activation] = {}
    for number, call in enumerate(calls):
        if not (call.path and call.is_activation and call.keeps_shape):
            continue
        siblings = [own for own in calls[:number] if own.parent == call.parent]
        starts = [n for n, own in enumerate(siblings, 1) if own.path in found]
        since = siblings[max(starts, default=0) :]
        entering = [own for own in since if own.tap.output is call.tap.input]
        found[call.path] = Activation(
            call.tap.input.shape[-1],
            next((own.path for own in entering if own.is_norm), ""),
            tuple(own.path for own in since if own.has_kernel),
        )
    return found


def _blocks(calls: list[_Call]) -> tuple[str, ...]:
    kernels = [call.path for call in calls if call.has_kernel]
    found: list[str] = []
    for call in calls:  # What is inside of a module has been applied before it.
        inside = f"{call.path}/"
        if (
            call.path
            and call.keeps_shape
            and any(path.startswith(inside) for path in kernels)
            and not any(path.startswith(inside) for path in found)
        ):
            found.append(call.path)
    return tuple(found)


def _open_gates(layers: Layers) -> Gates:
    channels = {path: own.channels for path, own in layers.activations.items()}
    return Gates(
        {path: jnp.array(True) for path in channels},
        {path: jnp.ones(number, bool) for path, number in channels.items()},
        {path: jnp.array(True) for path in layers.blocks},
    )


def _activate(active: jax.Array, channels: jax.Array, tap: Tap) -> jax.Array:
    through = channels.reshape(*[1] * (tap.input.ndim - 1), -1)
    return jnp.where(active, tap.output, jnp.where(through, tap.input, 0))


def _pass(active: jax.Array, tap: Tap) -> jax.Array:
    return jnp.where(active, tap.output, tap.input)
