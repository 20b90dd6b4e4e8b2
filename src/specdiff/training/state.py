"""What training changes, as plain whole tensors and back: network, its moving average, optimizer moments; sharded or not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = StateDictOptions(
    full_state_dict=True, cpu_offload=True
)  # on the main process alone; the others get nothing
SCATTER = StateDictOptions(full_state_dict=True)  # on every process
NETWORK = "network."  # a task's own parameters all lie in its network


@dataclass(slots=True)
class State:
    """A prepared model and optimizer. `decay` None: no moving average."""

    model: Any
    optimizer: torch.optim.Optimizer
    decay: float | None
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decay is not None:
            self.average = {name: p.detach().clone() for name, p in self._parameters()}

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Move the average towards the parameters; early ones are forgotten soon (as in the SEDD code)."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def network(self) -> dict[str, Tensor]:
        """The network's tensors, averaged where there is an average. Every process must call it."""
        own: dict[str, Any] = get_model_state_dict(self.model, options=WHOLE)
        averaged = {name: _whole(tensor) for name, tensor in self.average.items()}
        return {name.removeprefix(NETWORK): tensor for name, tensor in (own | averaged).items()}

    def dump(self) -> dict[str, Tensor]:
        """Everything resuming needs: m.* network, e.* average, o.* moments. Every process must call it."""
        own: dict[str, Any] = get_model_state_dict(self.model, options=WHOLE)
        moments: dict[str, Any] = get_optimizer_state_dict(
            self.model, self.optimizer, options=WHOLE
        )
        tensors = {f"m.{name}": tensor for name, tensor in own.items()}
        tensors |= {f"e.{name}": _whole(tensor) for name, tensor in self.average.items()}
        return tensors | {
            f"o.{name}.{kind}": value
            for name, kinds in moments.get("state", {}).items()
            for kind, value in kinds.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `dump`."""
        part: dict[str, dict[str, Any]] = {
            p: {k[2:]: v for k, v in tensors.items() if k.startswith(p)} for p in ("m.", "e.", "o.")
        }
        set_model_state_dict(self.model, part["m."], options=SCATTER)
        moments: dict[str, Any] = get_optimizer_state_dict(
            self.model, self.optimizer, options=SCATTER
        )
        for name, kinds in moments["state"].items():
            kinds.update(
                {kind: part["o."][f"{name}.{kind}"].clone() for kind in kinds}
            )  # step counts are taken over as they are
        set_optimizer_state_dict(self.model, self.optimizer, moments, options=SCATTER)
        with torch.no_grad():
            for name, tensor in self.average.items():
                tensor.copy_(_placed(part["e."][name], tensor))

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        return (
            (n.removeprefix("module."), p)
            for n, p in self.model.named_parameters()
            if p.requires_grad
        )


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _placed(value: Tensor, like: Tensor) -> Tensor:
    value = value.to(like.device)
    return (
        distribute_tensor(value, like.device_mesh, like.placements)
        if isinstance(like, DTensor)
        else value
    )
