"""The trained weights of a live engine, whole and in fp32, and their moving averages."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import broadcast_tensor, reduce_sum
from sdxl_trainer.train.engine.averages import Ema
from sdxl_trainer.train.engine.layout import Fragment, describe_layout
from sdxl_trainer.train.engine.patches import abandon_gathers, deepspeed, get_local_part, read_master_weights
from sdxl_trainer.train.optim.schedule_free import Z, compute_average, find_average_share

ReadPart = Callable[[int, Fragment], torch.Tensor]  # number of a flat tensor, place in it → values


class Weights:
    """Access to the trained weights by name, whatever the ZeRO stage.

    Args:
        engine: the engine that `deepspeed.initialize` returned.
        copies: this rank's share of the weights that were in fp32 before DeepSpeed made the masters from weights in
            16 bit; None if the masters are exact.
        exact_weights: name and value of weights that were in 16 bit already, in full precision.
        ema: the `ema` section.
        mark_written: called behind each change of what a checkpoint reads, except updates (`WriteMark.record`).
    """

    def __init__(
        self,
        engine: Any,
        copies: "Fp32Share | None",
        exact_weights: Iterable[tuple[str, torch.Tensor]],
        ema: EmaConfig | None,
        mark_written: Callable[[], None],
    ):
        self._engine = engine
        self._zero_stage: int = engine.zero_optimization_stage()
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self.layout = describe_layout(engine.optimizer, names, engine.global_rank, engine.world_size, self._zero_stage)
        # Name → (number of the flat tensor, fragment) of each part on this rank.
        self._fragments: dict[str, list[tuple[int, Fragment]]] = {name: [] for name in self.layout.shapes}
        for number, flat in enumerate(self.layout.flats):
            for fragment in flat.fragments:
                self._fragments[fragment.name].append((number, fragment))
        if copies is not None:
            self._set_masters(self._exchange(copies))
        self._set_masters(exact_weights)
        self.ema = Ema(ema, self.list_masters(), engine.device) if ema and ema.num_averages else None
        self._replaced: list[torch.Tensor] = []  # see use_average
        self._mark_written = mark_written
        self._share = find_average_share(engine.basic_optimizer.param_groups)

    @property
    def trained_names(self) -> list[str]:
        """Names of all trained parameters, equal on every rank."""
        return list(self._fragments)

    @property
    def average_names(self) -> list[str]:
        """Names of the moving averages, such as `"0.999"` and `"length-0.05"`, those of decays first."""
        return list(self.ema.averages) if self.ema else []

    def list_masters(self) -> list[torch.Tensor]:
        """List this rank's flat tensors of master weights, in the order of the layout."""
        return read_master_weights(self._engine.optimizer).tensors

    def update_averages(self) -> None:
        """Move every average towards the weights, after an update of the weights."""
        if self.ema:
            self.ema.update(self.list_masters())

    def finish_reading(self) -> None:
        """Wait until the averages have read the weights, which may change then."""
        if self.ema:
            self.ema.finish_reading()

    def gather(self, name: str, average: str | None = None) -> torch.Tensor:
        """Return a whole parameter in fp32, from the masters, on the CPU. All ranks call it together with one name.

        With a schedule-free optimizer, the weights of the model are its average (schedule_free.py).

        Args:
            average: return the moving average of this name (a key of `ema.averages`) instead of the weight.
        """
        if name in self._fragments:
            return self._assemble(name, self._open_parts(average)).cpu()
        # This parameter is frozen, and each rank holds a part of it under ZeRO-3.
        with deepspeed.zero.GatheredParameters([self._parameters[name]]):
            return self._parameters[name].detach().float().to("cpu", copy=True)

    @contextmanager
    def use_average(self, average: str | None) -> Iterator[None]:
        """Replace the model's weights by a moving average within the context.

        None keeps the weights, or takes the average of a schedule-free optimizer.

        All ranks enter together. Each rank keeps its own part of the weights and puts it back alone, because other
        ranks may be dead by then.
        """
        if average is None and self._share is None:
            yield
            return
        self._replaced = [weight.clone() for weight in self._list_local_weights()]
        self._mark_written()
        try:
            self._set_weights(self._open_parts(average))
            self._finish_writing()
            yield
        finally:
            self.restore_replaced()

    def restore_replaced(self) -> None:
        """Put back the weights that `use_average` has replaced, if any."""
        if self._replaced:
            for weight, replaced in zip(self._list_local_weights(), self._replaced, strict=True):
                weight.copy_(replaced)
            self._replaced = []
            self._mark_written()
            self._finish_writing()

    def _finish_writing(self) -> None:
        """Wait until the weights are written. ZeRO 3 gathers on a stream of its own, which does not wait for them."""
        if self._zero_stage == 3 and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def release_gathered(self, alone: bool = False) -> None:
        """Free the whole weights that ZeRO-3 has gathered.

        Args:
            alone: do not wait for gathers that are under way, because other ranks may be dead.
        """
        if self._zero_stage == 3:
            if alone:
                abandon_gathers(self._engine)
            self._engine.optimizer.checkpoint_event_prologue()

    def gather_persistent(self) -> None:
        """Gather the small weights that ZeRO-3 keeps whole on every rank. All ranks call it together."""
        if self._zero_stage == 3:
            self._engine.optimizer.checkpoint_event_epilogue()

    def _list_local_weights(self) -> list[torch.Tensor]:
        """List this rank's trained weights between steps: its share of each under ZeRO-3, otherwise all of them."""
        self.release_gathered()
        parameters = [self._parameters[name] for name in self._fragments]
        return [get_local_part(parameter) for parameter in parameters]

    def _open_parts(self, average: str | None = None) -> ReadPart:
        """Return a function that reads fragments of this rank: of the trained model, or of a moving average."""
        if average is not None:
            assert self.ema is not None, "no averages are kept"
            flats, state = self.ema.averages[average], {}
        else:
            flats, state = self.list_masters(), self._engine.basic_optimizer.state if self._share is not None else {}

        def read(number: int, fragment: Fragment) -> torch.Tensor:
            place = slice(fragment.offset, fragment.offset + fragment.numel)
            part = flats[number].detach().reshape(-1)[place]
            found = state.get(flats[number], {})
            return compute_average(part, {Z: found[Z].reshape(-1)[place]} if Z in found else {}, self._share)

        return read

    def _assemble(self, name: str, read: ReadPart) -> torch.Tensor:
        """Assemble a trained parameter from the fragments in every rank's tensors."""
        shape = self.layout.shapes[name]
        whole = torch.zeros(torch.Size(shape).numel(), device=self._engine.device)
        for number, fragment in self._fragments[name]:
            whole[fragment.start : fragment.start + fragment.numel] = read(number, fragment).to(whole.device)
        return (reduce_sum(whole) if self._zero_stage else whole).view(shape)

    def _exchange(self, copies: "Fp32Share") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and whole of every weight in the shares of all ranks. All ranks call it together."""
        engine = self._engine
        for number, name in enumerate(copies.names):
            held = copies.weights.get(name)
            shape = self.layout.shapes[name]
            whole = torch.empty(shape, device=engine.device) if held is None else held.to(engine.device)
            yield name, broadcast_tensor(whole, number % engine.world_size)

    @torch.no_grad()
    def _set_masters(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite this rank's part of masters, which DeepSpeed makes from weights in 16 bit, with exact values.

        Args:
            weights: names and whole weights, in any precision on any device.
        """
        masters = self.list_masters()
        for name, weight in weights:
            for number, fragment in self._fragments[name]:
                master = masters[number]
                # A master with the parameter's own shape may have its strides too.
                if master.shape == weight.shape:
                    master.copy_(weight.to(master.device))
                else:
                    part = weight.reshape(-1)[fragment.start : fragment.start + fragment.numel]
                    master[fragment.offset : fragment.offset + fragment.numel] = part.to(master.device)

    @torch.no_grad()
    def _set_weights(self, read: ReadPart) -> None:
        for name in self._fragments:
            whole, parameter = self._assemble(name, read), self._parameters[name]
            # The context gathers the parameter under ZeRO-3, and does nothing otherwise.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(whole)


@dataclass(frozen=True)
class Fp32Share:
    """Copies of the trained weights that are in fp32; each is held by one rank."""

    names: list[str]  # of all of them; rank R of W holds every W-th, starting at number R
    weights: dict[str, torch.Tensor]  # of this rank, on the host


def copy_fp32_share(model: torch.nn.Module, rank: int, world_size: int) -> Fp32Share:
    """Copy this rank's share of the trained weights that are in fp32."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    found = [(name, weight) for name, weight in trained if weight.dtype == torch.float32]
    return Fp32Share(
        names=[name for name, _ in found],
        weights={name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in found[rank::world_size]},
    )
