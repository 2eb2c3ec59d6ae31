"""How a model's attention module rotates query and key, read from the module's forward method."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn


class RotationError(ValueError):
    """CASCADE cannot apply a layer's rotary embedding by place in the cache.

    Args:
        layer_name: The layer, as vLLM names it.
        why: What is in the way, as a verb and its object.
    """

    def __init__(self, layer_name: str, why: str) -> None:
        super().__init__(
            f"CASCADE cannot serve this model: layer {layer_name} {why}. CASCADE applies the "
            "rotary embedding itself, by a key's place in the cache, and can do that only where a "
            "model applies a plain one directly before attention, or none. Serve this model "
            "without --attention-backend CASCADE."
        )


def check_rotation(module: nn.Module, attention_name: str, layer_name: str) -> bool:
    """Check that `module` does nothing between rotating query and key and attending with them.

    Some models skip the rotation in some layers, or normalize or scale the rotated query and key.
    A module's attributes do not show such a step, and CASCADE, which rotates later, would give
    wrong results without an error. So the source of the forward method is read:
    ``q, k = self.rotary_emb(positions, q, k)`` must run once, and the next use of ``q`` or ``k``
    must be ``self.<attention_name>(q, k, ...)``, but for a change of their shapes. Or nothing that
    runs before that call may read anything but the hidden states, of which no position can be
    learned. If another method than forward attends, that one is read, and a method of the module
    that rotates is read where it is called.

    Args:
        module: The module that owns the rotary embedding and the attention layer.
        attention_name: Name of the module's attribute that is the attention layer.
        layer_name: The layer's name, for the message.

    Returns:
        Whether the module rotates query and key.

    Raises:
        RotationError: The forward method has no source, or has any other form.
    """
    function = _attending_method(module, attention_name, layer_name)
    statements = list(_executed(function.body, module))
    statements = [each for s in statements for each in _inlined(s, module, layer_name)]
    rotations = [s for s in statements if _mentions(s, attribute="rotary_emb")]
    if not rotations:
        _check_without_positions(function, statements, attention_name, layer_name)
        return False
    if len(rotations) != 1:
        raise RotationError(layer_name, f"rotates query and key {len(rotations)} times")
    rotated = _rotated_names(rotations[0])
    if rotated is None:
        raise RotationError(layer_name, f"rotates by `{_first_line(rotations[0])}`")
    for statement in statements[statements.index(rotations[0]) + 1 :]:
        if _reshapes(statement, rotated):
            continue
        if any(_mentions(statement, name=name) for name in rotated):
            if _attends(statement, attention_name, rotated):
                return True
            raise RotationError(
                layer_name, f"changes the rotated query or key: `{_first_line(statement)}`"
            )
    raise RotationError(layer_name, "does not attend with the rotated query and key")


def _attending_method(module: nn.Module, attention_name: str, layer_name: str) -> ast.FunctionDef:
    """The forward method, or the only other one that calls the attention layer."""

    def attends(method: ast.FunctionDef) -> bool:
        return any(_self_call(node, attention_name) for node in ast.walk(method))

    forward = _method(module, "forward", layer_name)
    if attends(forward):
        return forward
    methods = dict(inspect.getmembers(type(module), inspect.isfunction))
    own = [_method(module, name, layer_name) for name in methods if not hasattr(nn.Module, name)]
    others = list(filter(attends, own))
    return others[0] if len(others) == 1 else forward


def _method(module: nn.Module, name: str, layer_name: str) -> ast.FunctionDef:
    try:
        source = inspect.getsource(inspect.unwrap(getattr(type(module), name)))
    except (OSError, TypeError) as error:
        raise RotationError(layer_name, "comes without source code to check") from error
    function = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


def _inlined(statement: ast.stmt, module: nn.Module, layer_name: str) -> list[ast.stmt]:
    """What runs in place of a call of a method of the module's own, if that method rotates.

    Only where its names are the caller's: ``a, b = self.method(x, y)`` for a ``method(self, x, y)``
    that ends with ``return a, b``.
    """
    call = statement.value if isinstance(statement, ast.Assign) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return [statement]
    name = call.func.attr
    if not _self_call(call, name) or not inspect.isfunction(getattr(type(module), name, None)):
        return [statement]
    function = _method(module, name, layer_name)
    if not _mentions(function, attribute="rotary_emb"):
        return [statement]
    assert isinstance(statement, ast.Assign)
    *body, last = _executed(function.body, module)
    given = ["self", *map(ast.unparse, call.args)]
    returned = isinstance(last, ast.Return) and last.value and ast.unparse(last.value)
    same = given == [each.arg for each in function.args.args] and not call.keywords
    if not same or returned != ast.unparse(statement.targets[0]) or len(statement.targets) > 1:
        raise RotationError(layer_name, f"rotates by `{_first_line(statement)}`")
    return body


def _check_without_positions(
    function: ast.FunctionDef, statements: list[ast.stmt], attention_name: str, layer_name: str
) -> None:
    """Check that the first call of the attention layer knows hidden states and nothing else."""
    parameters = function.args
    given = [*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs]
    given += [each for each in (parameters.vararg, parameters.kwarg) if each]
    others = {each.arg for each in given} - {"self", "hidden_states"}
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in others and isinstance(node.ctx, ast.Load):
                raise RotationError(layer_name, f"uses `{node.id}` by `{_first_line(statement)}`")
        if any(_self_call(node, attention_name) for node in ast.walk(statement)):
            return
    raise RotationError(layer_name, f"does not call `self.{attention_name}`")


def _executed(body: list[ast.stmt], module: nn.Module) -> Iterator[ast.stmt]:
    """The statements of `body`; the branch taken replaces each `if` that the module decides."""
    for statement in body:
        taken = _decide(statement.test, module) if isinstance(statement, ast.If) else None
        if isinstance(statement, ast.If) and taken is not None:
            yield from _executed(statement.body if taken else statement.orelse, module)
        elif not isinstance(statement, ast.Assert):
            yield statement


def _decide(test: ast.expr, module: nn.Module) -> bool | None:
    """The truth of `test` if it only reads attributes of `self`; otherwise None."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id != "self"):
            return None
    code = compile(ast.Expression(test), "<forward>", "eval")
    return bool(eval(code, {"__builtins__": {}}, {"self": module}))


def _mentions(
    statement: ast.stmt, *, name: str | None = None, attribute: str | None = None
) -> bool:
    return any(
        (isinstance(node, ast.Name) and node.id == name)
        or (isinstance(node, ast.Attribute) and node.attr == attribute)
        for node in ast.walk(statement)
    )


def _self_call(node: ast.AST, method: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{method}"


def _reshapes(statement: ast.stmt, names: list[str]) -> bool:
    """Whether `statement` is ``q = q.view(...)``, whose arguments are no query or key."""
    call = statement.value if isinstance(statement, ast.Assign) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    assert isinstance(statement, ast.Assign)
    target = [ast.unparse(each) for each in statement.targets]
    uses = [node for node in ast.walk(call) if isinstance(node, ast.Name) and node.id in names]
    return (
        call.func.attr in ("view", "reshape")
        and len(uses) == 1
        and target == [ast.unparse(call.func.value)]
        and target[0] in names
    )


def _rotated_names(statement: ast.stmt) -> list[str] | None:
    """The names `q, k` if `statement` is ``q, k = self.rotary_emb(positions, q, k)``, or None."""
    if not (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and _self_call(statement.value, "rotary_emb")
    ):
        return None
    call, target = statement.value, statement.targets[0]
    assert isinstance(call, ast.Call)
    if call.keywords or len(call.args) != 3 or not isinstance(target, ast.Tuple):
        return None
    names = [node.id for node in target.elts if isinstance(node, ast.Name)]
    return names if len(names) == len(target.elts) == 2 else None


def _attends(statement: ast.stmt, attention_name: str, rotated: list[str]) -> bool:
    """Whether `statement` attends with the rotated names and does nothing else with them."""
    calls = [node for node in ast.walk(statement) if _self_call(node, attention_name)]
    uses = [
        node
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and node.id in rotated and isinstance(node.ctx, ast.Load)
    ]
    return (
        isinstance(statement, ast.Assign | ast.Return)
        and len(calls) == 1
        and [ast.unparse(argument) for argument in calls[0].args[:2]] == rotated
        and len(uses) == 2
    )


def _first_line(statement: ast.stmt) -> str:
    return ast.unparse(statement).splitlines()[0]
