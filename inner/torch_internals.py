"""torch's private names, in this file alone, each with what happens in a torch that lacks it.

Private names move from one version of torch to the next. Each is looked up when it is used and not
before, so importing this file loads nothing of torch's compiler. What makes steps faster raises
Refused, upon which the caller does them by autograd and says why; what has a public twin is done by
that, with one warning.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec
else:
    TreeSpec = Any

Run = Callable[..., Sequence[Tensor]]
_NONE = object()


class Refused(Exception):
    """Why a faster way of doing steps is not taken: it cannot be, or it differs from autograd's."""


def _find(module: str, *names: str) -> Any:
    """A module, or what a path of names in it leads to; Refused if there is no such thing."""
    path = module
    try:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
    except Exception as error:  # The compiler fails to load in many ways, and one is enough.
        raise Refused(f"this torch has no {path} ({type(error).__name__}: {error})") from error
    for name in names:
        path += f".{name}"
        found = getattr(found, name, _NONE)
        if found is _NONE:
            raise Refused(f"this torch has no {path}")
    return found


def _warn(name: str, consequence: str) -> None:
    """Say what a missing name costs; once, as warnings do."""
    warnings.warn(f"this torch has no {name}: {consequence}", RuntimeWarning, stacklevel=3)


# Tracing and compiling.


def trace(function: Callable[..., Any], examples: Sequence[Tensor]) -> fx.GraphModule:
    """The operations of a function on tensors of these shapes, which are not computed.

    By make_fx; Refused without it.
    """
    make_fx = _find("torch.fx.experimental.proxy_tensor", "make_fx")
    made = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    return cast(fx.GraphModule, made)


def without_duplicates(graph: fx.Graph) -> fx.Graph:
    """A graph in which nothing is computed twice, draws apart.

    By fx_graph_cse; Refused without it.
    """
    return cast(fx.Graph, _find("torch._functorch.compile_utils", "fx_graph_cse")(graph))


def mutates(target: object) -> bool:
    """Whether an operation writes into what it is given, as far as torch says; batch norms do, and
    do not say it. Where torch does not say, True: then a graph is traced once more.
    """
    schema = getattr(target, "_schema", None)
    return schema is None or schema.is_mutable or "batch_norm" in schema.name


def partition(
    joint: fx.GraphModule, back: int, outputs: int, *, recompute: bool
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph of a function and its pullback as two: the first gives the function's outputs, and
    behind them what the second takes, followed by the last `back` inputs.

    recompute: do again on the way back whatever costs no product, and not only what must be. By
    the min-cut partitioner; Refused without it. The graph given is spent.
    """
    cut = _find("torch._functorch.partitioners", "min_cut_rematerialization_partition")
    patch = _find("torch._functorch.config", "patch")
    inputs = [n for n in joint.graph.nodes if n.op == "placeholder"]
    first = len(inputs) - back
    # Torches before 2.7 have no such argument; all inputs of ours may be freed anyway.
    named = "static_lifetime_input_indices"
    options: dict[str, Any] = {named: []} if named in inspect.signature(cut).parameters else {}
    try:
        # The partitioner tells the two kinds of inputs by their names.
        for k, n in enumerate(inputs):
            n.target = f"primals_{k + 1}" if k < first else f"tangents_{k - first + 1}"
            n._rename(n.target)
        joint.recompile()
        with patch(aggressive_recomputation=recompute):
            there, again = cut(joint, None, num_fwd_outputs=outputs, **options)
    except (AttributeError, KeyError, TypeError) as error:  # It is called otherwise by now.
        raise Refused(f"this torch has no such partitioner: {error}") from error
    return there, again


def generate_code(
    graph: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]
) -> Run:
    """A graph as machine code for tensors of these shapes, with code of earlier runs looked for on
    disk. By inductor; Refused without it.
    """
    generate = _find("torch._inductor", "compile")
    context, within = _find("torch._guards", "TracingContext"), _find("torch._guards", "tracing")
    shape_env = _find("torch.fx.experimental.symbolic_shapes", "ShapeEnv")
    fake = _find("torch._subclasses.fake_tensor", "FakeTensorMode")
    # It looks on disk only for what was traced in a context such as dynamo's.
    with within(context(fake(shape_env=shape_env(), static_shapes=True))):
        return cast(Run, generate(graph, list(inputs), options=dict(options)))


def unfused() -> AbstractContextManager[None]:
    """Where TorchScript runs operations one by one, as they are; Refused without the switch."""
    return cast(
        AbstractContextManager[None], _find("torch.jit._fuser", "optimized_execution")(False)
    )


def tree_flatten(tree: object) -> tuple[list[Any], TreeSpec]:
    """(the leaves of nested tuples, lists and dicts, what they were nested in); Refused without
    torch's pytrees.
    """
    return cast(tuple[list[Any], "TreeSpec"], _find("torch.utils._pytree", "tree_flatten")(tree))


def tree_unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """The tree of such leaves; Refused without torch's pytrees."""
    return _find("torch.utils._pytree", "tree_unflatten")(list(leaves), spec)


# Autograd.


def only_reverse_mode() -> bool:
    """Whether no function transform and no forward mode looks on. Where torch does not say, False:
    then a batch in parts takes the memory of a whole one.
    """
    try:
        transformed = torch._C._are_functorch_transforms_active()
        return not transformed and torch.autograd.forward_ad._current_level < 0
    except AttributeError as error:
        _warn(str(error.name), "accumulate= saves no memory")
        return False


def version_of(x: Tensor) -> int:
    """How often a tensor was written into. Where torch does not count, 0: then a state that was
    overwritten is taken for one that was not.
    """
    version = getattr(x, "_version", None)
    if version is None:
        _warn("Tensor._version", "a carry that is used twice goes unnoticed")
        return 0
    return int(version)


@contextmanager
def below_autograd() -> Iterator[None]:
    """Without what autograd notes of views, which takes longer than the views, and half of their
    memory. For tensors that no graph is of; what writes into weights has to be outside, where it
    counts their versions. Where torch has no such switch, nothing is left out.
    """
    c = torch._C
    below: AbstractContextManager[None]
    unseen: AbstractContextManager[None]
    try:
        views = c.DispatchKeySet(c.DispatchKey.ADInplaceOrView)
        below, unseen = c._AutoDispatchBelowAutograd(), c._ExcludeDispatchKeyGuard(views)
    except AttributeError as error:
        _warn(f"torch._C.{error.name}", "views of weights are slower")
        below, unseen = nullcontext(), nullcontext()
    with below, unseen:
        yield


# Many tensors in one call.


def flatten_dense(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector; by cat where torch lacks its own, which calls Python once for all."""
    try:
        flat: Tensor = torch._utils._flatten_dense_tensors(tensors)
    except AttributeError:
        _warn("torch._utils._flatten_dense_tensors", "many small weights are gathered slower")
        flat = torch.cat([x.reshape(-1) for x in tensors])
    return flat


def unflatten_dense(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector in the shapes of tensors; by split and view where torch lacks its own."""
    try:
        return list(torch._utils._unflatten_dense_tensors(flat, like))
    except AttributeError:
        _warn("torch._utils._unflatten_dense_tensors", "many small weights are split slower")
        parts = flat.split([x.numel() for x in like])
        return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def foreach_copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Write each of the tensors into its own; one by one where torch lacks a call for all."""
    try:
        copy = torch._foreach_copy_
    except AttributeError:
        _warn("torch._foreach_copy_", "many small tensors are copied one by one")
        for x, y in zip(into, source, strict=True):
            x.copy_(y)
        return
    copy(list(into), list(source))


def foreach_sub(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Subtract each of the tensors from its own; one by one where torch lacks a call for all."""
    try:
        subtract = torch._foreach_sub_
    except AttributeError:
        _warn("torch._foreach_sub_", "many small tensors are subtracted one by one")
        for x, y in zip(into, source, strict=True):
            x.sub_(y)
        return
    subtract(list(into), list(source))


__all__ = [
    "Refused",
    "Run",
    "TreeSpec",
    "below_autograd",
    "flatten_dense",
    "foreach_copy",
    "foreach_sub",
    "generate_code",
    "mutates",
    "only_reverse_mode",
    "partition",
    "trace",
    "tree_flatten",
    "tree_unflatten",
    "unflatten_dense",
    "unfused",
    "version_of",
]
