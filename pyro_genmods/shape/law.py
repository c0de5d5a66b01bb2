r"""An energy's law as Pyro sees it, and what it refuses.

A log density without its constant is right wherever the constant cancels, and silently wrong wherever it does not: a
context that is inferred moves :math:`Z(c)` with it. In the model :math:`c \sim \mathcal N(0, 1)`,
:math:`p(x \mid c) \propto e^{-|x|^2 e^c}` in the plane, with :math:`y = 0` seen of :math:`\mathcal N(x, 1)`, the
posterior mean of :math:`c` is 0.300 and would come out as -0.534. So the law looks at who differentiates it: a context
with a gradient or under a transform of functorch, a context along a dimension in which Pyro enumerates, parameters of
Pyro's store, and what a plain function of an energy holds on to. Who weighs without gradients, by importance or by
score functions, is not seen here; the samplers of :mod:`pyro_genmods.infer` look at the program itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Size, Tensor, nn
from torch._C import _functorch

from ..distribution import GenerativeDistribution
from ..foundation.errors import DensityError, DoublyIntractableError

if TYPE_CHECKING:
    from .steps import Steps

__all__ = ["EnergyDistribution"]


class EnergyDistribution(GenerativeDistribution):
    """An energy's law at a context.

    Arguments are those of :class:`~pyro_genmods.contract.GenerativeDistribution`.

    Raises:
        DoublyIntractableError: at ``log_prob``, where its constant depends on what is being inferred or learned, and
            none is attached.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> law = gm.Energy(1, context_features=1, network=lambda y, c: (y * c.exp())[:, 0] ** 2)
        >>> c = torch.zeros(1, requires_grad=True)
        >>> law(c).log_prob(torch.ones(1))
        Traceback (most recent call last):
        ...
        pyro_genmods.foundation.errors.DoublyIntractableError: context: it is being inferred, ...
        >>> law(c.detach()).log_prob(torch.ones(1))
        tensor(-2.4189)
    """

    model: Any
    _report: Any = None

    def __init__(
        self,
        model: Any,
        context: Tensor | None = None,
        batch_shape: Size | tuple[int, ...] = (),
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(model, context, batch_shape, validate_args)
        self._enumerated = context is not None and _enumerated(self.batch_shape)

    @property
    def report(self) -> Any:
        """The last :func:`pyro_genmods.shape.mixing_report` of this law, or ``None``."""
        known = getattr(self.model, "report", None)
        return known if self.context is None or known is None else self._report

    @property
    def untilted(self) -> TorchDistributionMixin:
        """The law of the base, which has a density and draws; the law itself is this one times the exponential of
        :meth:`tilt`.

        Raises:
            DensityError: there is none.
        """
        model = self.model
        if model.base is None:
            raise DensityError("Energy has no base (base=None): nothing normalised is being tilted.")
        if model.base.context_shape:
            return model.base(self.context)
        return model.base().expand(self.batch_shape)

    def tilt(self, value: Tensor) -> Tensor:
        r"""Log density relative to the base, :math:`-E(x) - \log Z` as far as known.

        Arguments:
            value: ``(*lead, *event_shape)``.
        """
        if self.model.base is None:
            raise DensityError("Energy has no base (base=None): there is no tilt, log_prob is all there is.")
        self._check_constant()
        lead, x, c = self._rows(value, self.event_shape)
        y, _ = self.model.coordinates.pull(x)
        tilt = -self.model.energy_rows(y, c, fixed=True)
        if self.model.normalizer.attached:
            tilt = tilt - self.model.normalizer(c, len(y))
        return self._values(tilt, lead)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, up to a constant unless a normaliser is attached; see :attr:`density`.

        Arguments:
            value: ``(*lead, *event_shape)``.

        Raises:
            DoublyIntractableError: the constant depends on what is being inferred or learned.
            SupportError, ShapeError, PlacementError: see :class:`~pyro_genmods.contract.GenerativeDistribution`.
        """
        self._check_constant()
        return super().log_prob(value)

    def _check_constant(self) -> None:
        model = self.model
        if model.normalizer.attached or model.allow_unnormalized or not torch.is_grad_enabled():
            return
        if self._enumerated or (self.context is not None and _inferred(self.context)):
            raise DoublyIntractableError(
                "context: it is being inferred, and the law's constant depends on it and is unknown, so that the "
                "posterior would be another model's. " + REMEDIES
            )
        if next(model.network.parameters(), None) is None and _held(self._energy_at_nought()):
            raise DoublyIntractableError(
                "network: the function holds on to something that is being inferred or learned, and so does the law's "
                "constant, which is unknown. Give it to the function as context. " + REMEDIES
            )
        if model.learn is None:
            names = _learned(model)
            if names:
                raise DoublyIntractableError(
                    f"parameters {', '.join(map(repr, names[:4]))}: they are being learned through log_prob, and the "
                    "gradient of the unknown constant would be missing: the energy of the data would run to minus "
                    "infinity. Fit the energy first and freeze it, set learn='contrastive' (with "
                    "objective='contrastive'), or give Energy a log_normalizer that depends on the parameters."
                )

    def _energy_at_nought(self) -> Tensor:
        dtype, device = self.model.place
        widths = (self.model.features, self.model.context_shape.numel() if self.model.context_shape else 0)
        y, c = (torch.zeros(1, width, dtype=dtype, device=device) for width in widths)
        return self.model.energy_rows(y, c if self.model.context_shape else None)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:
        """Refused: a chain has no pathwise gradient."""
        raise DensityError(
            f"{self} has no pathwise gradient: its draws are ends of chains; use sample() and log_prob()."
        )

    def steps(self, n: int) -> Steps:
        """The annealed chain from the base to the law, opened up at ``n`` temperatures."""
        from .steps import Steps

        return Steps(self, n)


REMEDIES = (
    "Attach a normaliser (shape.normalize(model, contexts), or Energy(log_normalizer=...)), sample the few parameters "
    "upstream by infer.Exchange, condition on them or detach what is fixed, or say allow_unnormalized=True if that "
    "other model is meant."
)


def _inferred(x: Tensor) -> bool:
    """Whether a tensor has a gradient, or is one of many under ``torch.vmap``."""
    while _functorch.is_functorch_wrapped_tensor(x) and not x.requires_grad:
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)  # constants are wrapped too where functorch differentiates
    return x.requires_grad


def _enumerated(batch_shape: Size) -> bool:
    """Whether a batch extends along a dimension in which Pyro enumerates a latent, here and now."""
    messengers = [messenger for messenger in _PYRO_STACK if isinstance(messenger, EnumMessenger)]
    dims = {dim for messenger in messengers for dims in messenger._value_dims.values() for dim in dims}
    return any(len(batch_shape) >= -dim and batch_shape[dim] > 1 for dim in dims)


def _held(energy: Tensor) -> bool:
    """Whether an energy of constant rows depends on latents, or on parameters of Pyro's store."""
    if _functorch.is_functorch_wrapped_tensor(energy):
        return _inferred(energy)
    known = pyro.get_param_store()._param_to_name
    nodes, seen = [energy.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and (leaf in known or not isinstance(leaf, nn.Parameter)):
            return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _learned(model: Any) -> list[str]:
    """Parameters that belong to Pyro's store, or are no leaves, so that somebody infers them."""
    names = pyro.get_param_store()._param_to_name
    found = []
    for name, parameter in model.network.named_parameters():
        if parameter in names:
            found += [names[parameter]] if parameter.requires_grad else []
        elif not parameter.is_leaf or (_functorch.is_functorch_wrapped_tensor(parameter) and _inferred(parameter)):
            found.append(name)
    return found
