"""A scalar reward of the user's own: ``package.module:function``, called once as ``make(device, dtype)``.

What it returns is called with (frames_BTCHW in [0, 1], RGB; the prompt of each clip) and gives values (B,), higher is
better, differentiable in the frames. A ``torch.nn.Module`` is frozen, put in eval mode and moved with the critic.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_drf.errors import BadInputError

_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_entry(reward_id: str) -> bool:
    """Whether an id is ``package.module:function``, and not a folder or an id of the hub."""
    return bool(_ENTRY.fullmatch(reward_id))


def find_maker(entry: str) -> Callable[..., Any]:
    """The function that ``entry`` names, of an installed package or of a file in the current folder.

    Raises BadInputError: there is none.
    """
    module_name, _, name = entry.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):  # one that it imports itself
            raise BadInputError(f"the reward {entry} imports {error.name}, which is not installed.") from error
        cure = f"It is looked for in {here} and among the installed packages"
        raise BadInputError(f"the reward {entry}: there is no module {error.name}. {cure}.") from error
    finally:
        sys.path.remove(here)
    maker = getattr(module, name, None)
    if not callable(maker):
        raise BadInputError(f"the reward {entry}: {module.__file__ or module_name} has no function {name}.")
    found: Callable[..., Any] = maker
    return found


class UserReward(nn.Module):
    """``types.ScalarReward`` around what the user's function made. Raises BadInputError if that is not callable."""

    def __init__(self, entry: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        made = find_maker(entry)(device, dtype)
        if not callable(made):
            raise BadInputError(f"the reward {entry} made a {type(made).__name__}: it is to return a callable.")
        if isinstance(made, nn.Module):
            made.eval().requires_grad_(False)
        self._entry, self.reward = entry, made

    def forward(self, frames_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,), in fp32 or fp64.

        Raises BadInputError: other values than the module's docstring says.
        """
        values = self.reward(frames_BTCHW, list(prompts))
        if not isinstance(values, Tensor) or values.shape != (len(prompts),) or not values.is_floating_point():
            what = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise BadInputError(
                f"the reward {self._entry} gave {what} for {len(prompts)} clips: it is to give a tensor of shape "
                f"({len(prompts)},), a floating-point value for each."
            )
        if frames_BTCHW.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
            raise BadInputError(
                f"the reward {self._entry} gave values without a gradient: compute them from the frames with PyTorch, "
                "without no_grad, detach, item or numpy."
            )
        return values.to(torch.promote_types(values.dtype, torch.float32))
