r"""The hall: what a generative model is, for every mechanism.

A generative model is a pair (density :math:`p_\phi`, sampler). Most samplers are pushforwards: noise :math:`z` of a
simple law is carried to the data space,

.. math:: z \sim p_Z, \qquad x = \mathrm{push}_\phi(z), \qquad
          \log p_\phi(x) = \log p_Z(z) - \log\left|\det \frac{\partial x}{\partial z}\right| ,

where the second equation is there only if the push can be inverted. A :class:`GenerativeModel` owns the parameters;
called with a context it returns a :class:`GenerativeDistribution`, which Pyro takes wherever it takes ``Normal``.

A mechanism implements a few *row functions* on tensors of shape ``(rows, features)`` in standardised, unconstrained
coordinates. Everything that Pyro asks for besides (any leading dimensions, ``expand``, plates, masks, supports, units,
contexts, errors) is done here, once.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from .distribution import GenerativeDistribution
from .foundation.objectives import negative_log_likelihood
from .foundation.shapes import Context, Rows
from .mechanism import Cost, Density, Mechanism

__all__ = ["Cost", "Density", "GenerativeDistribution", "GenerativeModel", "Mechanism"]

Model = TypeVar("Model", bound="GenerativeModel")


class GenerativeModel(Mechanism):
    r"""A learnable distribution: a mechanism, its training objective, and its law at a context.

    Subclasses set :attr:`density`, and implement :attr:`cost` and the row functions they have; CONTRIBUTING has a
    skeleton. Arguments, attributes and errors are those of :class:`~pyro_genmods.mechanism.Mechanism`.
    """

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        r"""The distribution :math:`p(x \mid c)`.

        Arguments:
            context: ``(*batch, *context_shape)`` for a conditional model, else ``None``.

        Raises:
            ShapeError: the context is missing, superfluous or of another size.
            PlacementError: the context has another dtype or device than the model.
        """
        return GenerativeDistribution(self, context)

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The mechanism's training objective per example, by default the negative log-likelihood in nats.

        Arguments:
            x: ``(batch, *event_shape)``, in the user's units.
            context: ``(batch, *context_shape)`` or ``None``.

        Returns:
            ``(batch,)``.
        """
        law = self(context)
        law._validate_args = False  # a training loop checks its data once, not at every step
        return negative_log_likelihood(law.log_prob(x))

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Learn the units of data and context: shift and scale of the unconstrained coordinates.

        Arguments:
            x: ``(n, *event_shape)``.
            context: ``(n, *context_shape)`` or ``None``.

        Raises:
            DataError: a column of ``x`` is constant.
        """
        self.coordinates.standardize(x)
        if self.context_standardization is not None and context is not None:
            self.context_standardization.fit_(context.reshape(len(context), -1))

    def rows(self, x: Tensor, context: Tensor | None = None) -> tuple[Rows, Context | None]:
        """Examples and contexts in the coordinates in which networks learn.

        Arguments:
            x: ``(batch, *event_shape)``, in the user's units.
            context: ``(batch, *context_shape)`` or ``None``.

        Returns:
            ``(batch, features)`` and ``(batch, context)``, or ``None``.
        """
        _, rows, c = self(context)._rows(x, self.event_shape)
        return self.coordinates.pull(rows)[0], c

    def after_fit(self, x: Tensor, context: Tensor | None = None) -> None:
        """What remains to be decided once the weights are learned; nothing, by default. Called by ``fit`` at its end.

        Arguments:
            x: the examples, ``(n, *event_shape)``, on whatever device they are.
            context: ``(n, *context_shape)`` or ``None``.
        """

    def freeze(self: Model) -> Model:
        """Stop learning: ``requires_grad_(False)`` and ``eval()``; a frozen prior stays what it is under SVI."""
        return self.requires_grad_(False).eval()
