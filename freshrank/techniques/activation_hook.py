"""A hook on the activations between the interaction module I and the prediction module F (eq. 1), for any model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from freshrank.errors import ConfigError


class ActivationHook:
    """What enters, or leaves, the module the caller names: read as ``z`` after every pass, changed within ``through``.

    In another training loop, where F is the model's last layer::

        hook = ActivationHook(model.head)
        loss = bce(model(x), y)
        z_mix, y_mix = mixup(hook.z, y, 0.2)
        with hook.through(lambda z: z_mix):
            loss = loss + 0.2 * bce(model(x), y_mix)

    Outside ``through`` every value passes unchanged: the model is bit-identical to one without a hook. Whatever reaches
    the prediction on another way (a wide part, say) is neither read nor changed.
    """

    z: Tensor

    def __init__(self, module: nn.Module, side: Literal["input", "output"] = "input") -> None:
        self.module, self.passes = module, 0
        self._function: Callable[[Tensor], Tensor] = _identity
        if side == "input":
            module.register_forward_pre_hook(lambda _, arguments: (self._pass(arguments[0]), *arguments[1:]))
        else:
            module.register_forward_hook(lambda _, arguments, output: self._pass(output))

    @contextmanager
    def through(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """For one pass of the model, ``function(z)`` [B, ..] takes the place of z.

        Raises:
            ConfigError: the module ran never, or more than once, in it.
        """
        self._function, self.passes = function, 0
        try:
            yield
        finally:
            self._function = _identity
        if self.passes != 1:
            raise ConfigError(
                f"hook: {type(self.module).__name__} ran {self.passes} times, expected once; name a module that every "
                "pass of the model runs exactly once, and call the model once within `through`"
            )

    def _pass(self, z: Any) -> Tensor:
        self.passes += 1
        self.z = self._function(z)
        return self.z


def _identity(z: Tensor) -> Tensor:
    return z
