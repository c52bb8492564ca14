"""The modules: ``RNN`` in the place of ``torch.nn.RNN``, and the character model ``CharRNN``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.torch.functional import DTYPES, autocasting, gather, layer, recurrence


class RNN(nn.RNNBase):  # type: ignore[misc]
    """``torch.nn.RNN`` with fastrnn's recurrence: same arguments, results, parameters, state dict.

        h_t = tanh(x_t weight_ihᵀ + bias_ih + h_{t-1} weight_hhᵀ + bias_hh)

    With ``nonlinearity="relu"``, for which there is no fused kernel, torch's own code is run. It
    is no subclass of ``torch.nn.RNN``, because torch.compile refuses to trace those.

    Args:
        input_size, hidden_size: I and H. num_layers: L. nonlinearity: "tanh" or "relu".
        bias: whether there are ``bias_ih`` and ``bias_hh``. batch_first: see the shapes below.
        dropout: probability of the dropout after each layer but the last; from the same seed it
            drops what ``torch.nn.RNN`` drops.
        bidirectional: D = 2 directions instead of 1; their outputs lie side by side.
        device, dtype: of the parameters; float32 or float64.

    Parameters, with ``k`` from 0 to L - 1 and, for the second direction, ``_reverse`` at the end:
        ``weight_ih_l{k}`` ``[H, I]`` (``[H, D H]`` for k > 0), ``weight_hh_l{k}`` ``[H, H]``,
        ``bias_ih_l{k}``, ``bias_hh_l{k}`` ``[H]``; drawn from U(-1/√H, 1/√H).

    Raises:
        ValueError, TypeError: as ``torch.nn.RNN``; ``proj_size`` is an LSTM's and refused.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if proj_size != 0:
            raise ValueError(f"an RNN has no projections (an LSTM has), got proj_size={proj_size}")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        shown: str = super().extra_repr()
        return shown if self.nonlinearity == "tanh" else f"{shown}, nonlinearity='relu'"

    def flatten_parameters(self) -> None:
        """Does nothing: the weights may lie anywhere. (For relu, what ``torch.nn.RNN`` does.)"""
        if self.nonlinearity == "relu":
            super().flatten_parameters()

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run over a batch of sequences, a single one, or sequences of several lengths.

        Args:
            input: ``[T, B, I]``, or ``[B, T, I]`` with ``batch_first``; ``[T, I]`` for a single
                sequence; or a ``PackedSequence``. Of the weights' dtype and device.
            hx: the initial state ``[L D, B, H]``, ``[L D, H]`` for a single sequence; zero where
                None. Its gradient is computed too.

        Returns:
            output: ``[T, B, D H]``, ``[B, T, D H]``, ``[T, D H]`` or packed, as the input is.
            h_n: the last states, shaped as ``hx``.

        Raises:
            RuntimeError: a shape that does not fit, or no time step at all.
            ValueError: an input neither 2-D nor 3-D, or of another dtype than the weights.
            TypeError: weights that are not float32 or float64.
        """
        weight = getattr(self, self._all_weights[0][0])
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"fastrnn.torch.RNN computes in float32 or float64, got weights of {weight.dtype}; "
                "for mixed precision keep float32 weights and use torch.autocast"
            )
        if not autocasting(weight):
            return self._run(input, hx, weight)
        if isinstance(input, PackedSequence):
            input = input._replace(data=_wide(input.data, weight))
        else:
            input = _wide(input, weight)
        hx = None if hx is None else _wide(hx, weight)
        with torch.autocast(weight.device.type, enabled=False):
            return self._run(input, hx, weight)

    def _run(
        self, input: Tensor | PackedSequence, hx: Tensor | None, weight: Tensor
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            self._check_input(data, weight, 2)
            hx = self._initial(data, hx, int(batch_sizes[0]), sorted_indices)
            data, h_n = self._stack(data, hx, batch_sizes)
            output = PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)
            return output, self.permute_hidden(h_n, unsorted_indices)
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: expected input to be 2D or 3D, got {input.dim()}D instead")
        if hx is not None and hx.dim() != input.dim():
            raise RuntimeError(
                f"for {input.dim()}-D input, hx should be {input.dim()}-D too, got {hx.dim()}-D"
            )
        single = input.dim() == 2
        if single:
            input = input.unsqueeze(1)
            hx = None if hx is None else hx.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        self._check_input(input, weight, 3)
        if input.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, h_n = self._stack(input, self._initial(input, hx, input.shape[1]), None)
        if output.requires_grad and not self.bidirectional and self.nonlinearity == "tanh":
            # The layer keeps what it returned for its gradient; the caller may change a copy.
            output = output.clone()
        if single:
            return output.squeeze(1), h_n.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output, h_n

    def _check_input(self, input: Tensor, weight: Tensor, dim: int) -> None:
        if input.dtype != weight.dtype:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: "
                f"model.to({input.dtype})"
            )
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, "
                f"got {input.shape[-1]}"
            )

    def _initial(
        self, input: Tensor, hx: Tensor | None, B: int, order: Tensor | None = None
    ) -> Tensor:
        """The initial state, checked, in the order of a packed sequence; zero where None."""
        shape = (len(self._all_weights), B, self.hidden_size)
        if hx is None:
            weight = getattr(self, self._all_weights[0][0])
            return torch.zeros(shape, dtype=weight.dtype, device=input.device)
        if tuple(hx.shape) != shape:
            raise RuntimeError(f"Expected hidden size {shape}, got {list(hx.shape)}")
        return self.permute_hidden(hx, order)

    def _stack(
        self, input: Tensor, hx: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All layers and directions: ``[T, B, I]``, or packed ``[N, I]`` with ``batch_sizes``."""
        if self.nonlinearity == "relu":
            return self._relu(input, hx, batch_sizes)
        D = 2 if self.bidirectional else 1
        layout = None if batch_sizes is None else _Packing(batch_sizes, input.device)
        last_states = []
        for k in range(self.num_layers):
            outputs = []
            for direction in range(D):
                i, reverse = k * D + direction, bool(direction)
                W_ih, W_hh, *biases = (getattr(self, name) for name in self._all_weights[i])
                bias = biases[0] + biases[1] if biases else None
                if layout is not None:
                    x = layout.pad(input, reverse)
                else:
                    x = input.flip(0) if reverse else input
                h = self._layer(k, x, W_ih.t(), bias, W_hh.t(), hx[i])
                if layout is not None:
                    h, h_n = layout.pack(h, reverse)
                else:
                    h_n, h = h[-1], h.flip(0) if reverse else h
                outputs.append(h)
                last_states.append(h_n)
            input = torch.cat(outputs, dim=-1) if D == 2 else outputs[0]
            if self.dropout and self.training and k < self.num_layers - 1:
                input = nn.functional.dropout(input, self.dropout)
        return input, torch.stack(last_states)

    def _layer(
        self, k: int, x: Tensor, W_xh: Tensor, bias: Tensor | None, W_hh: Tensor, h0: Tensor
    ) -> Tensor:
        """Layer ``k`` in one direction: ``[T, B, I]`` to ``[T, B, H]``."""
        if x.shape[0] == 1:  # no recurrence
            z = nn.functional.linear(x[0], W_xh.t(), bias)
            return torch.tanh(torch.addmm(z, h0, W_hh)).unsqueeze(0)
        return layer(x, W_xh, bias, W_hh, h0)

    def _relu(self, input: Tensor, hx: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = [getattr(self, name) for names in self._all_weights for name in names]
        settings = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is None:
            result = torch.rnn_relu(input, hx, weights, *settings, False)
        else:
            result = torch.rnn_relu(input, batch_sizes, hx, weights, *settings)
        output, h_n = result
        return output, h_n


class _Packing:
    """Where the rows of a ``PackedSequence`` go when every sequence gets T steps, and back.

    Row ``offset[t] + b`` of the packed data, N rows, is step t of sequence b. The steps after a
    sequence's end are fed zeros; what they yield is not looked at, and gets no gradient.
    """

    def __init__(self, batch_sizes: Tensor, device: Any) -> None:
        T, B = len(batch_sizes), int(batch_sizes[0])
        steps, rows = torch.arange(T)[:, None], torch.arange(B)
        there = rows < batch_sizes[:, None]  # [T, B]
        lengths = there.sum(0)
        offset = batch_sizes.cumsum(0) - batch_sizes
        mirrored = (lengths - 1 - steps).clamp(min=0)
        nothing = int(batch_sizes.sum())
        self.shape = (T, B)
        self.padded, self.packed = [], []
        for step in (steps.expand(T, B), mirrored):
            source = torch.where(there, offset[step] + rows, nothing)
            self.padded.append(source.flatten().to(device))
            self.packed.append((step * B + rows)[there].to(device))
        self.last = ((lengths - 1) * B + rows).to(device)

    def pad(self, rows: Tensor, reverse: bool) -> Tensor:
        """``[N, I]`` to ``[T, B, I]``, each sequence from its first step, or from its last."""
        with_nothing = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return with_nothing.index_select(0, self.padded[reverse]).view(*self.shape, -1)

    def pack(self, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """``[T, B, H]`` to ``[N, H]``, and the last states ``[B, H]``."""
        h = h.flatten(0, 1)
        return h.index_select(0, self.packed[reverse]), h.index_select(0, self.last)


class TokenRNN(RNN):
    """An RNN over one-hot vectors, given by the numbers of their ones: int32 or int64 ``[T, B]``.

    ``weight_ih_l0`` ``[H, V]`` lies in memory as its transpose, whose rows are gathered.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, device: Any, dtype: Any) -> None:
        super().__init__(vocab_size, hidden_size, device=device, dtype=dtype)
        rows = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
        self.weight_ih_l0: Tensor = nn.Parameter(rows.t())

    def _run(
        self, input: Tensor | PackedSequence, hx: Tensor | None, weight: Tensor
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if not isinstance(input, Tensor) or input.dim() != 2 or len(input) == 0:
            raise ValueError("tokens must have shape [T, B] with T >= 1")
        return self._stack(input, self._initial(input, hx, input.shape[1]), None)

    def _layer(
        self, k: int, x: Tensor, W_xh: Tensor, bias: Tensor | None, W_hh: Tensor, h0: Tensor
    ) -> Tensor:
        return recurrence(gather(W_xh, x, bias), W_hh, h0)


class CharRNN(nn.Module):  # type: ignore[misc]
    """The character-level language model of :class:`fastrnn.CharRNN` as a torch module.

        Z_t = W_xh[x_t] + H_{t-1} W_hh + b_h,   H_t = tanh(Z_t),   O_t = H_t W_hq + b_q

    Characters are gathered, never multiplied as one-hot vectors. The parameters have the names and
    shapes of an ``nn.RNN(V, H)`` called ``rnn`` and an ``nn.Linear(H, V)`` called ``linear``, so

        net.load_state_dict(model.to_torch())                 # model: a fastrnn.CharRNN
        model = fastrnn.load_torch(net.state_dict(), vocab)

    Args:
        vocab_size: V. hidden_size: H. device, dtype: of the parameters; float32 or float64.

    Attributes:
        rnn: ``weight_ih_l0`` ``[H, V]`` (W_xhᵀ, laid out for the gather), ``weight_hh_l0``
            ``[H, H]`` (W_hhᵀ), ``bias_ih_l0`` ``[H]`` (b_h), and ``bias_hh_l0``, which is there for
            its name: it is added, but not trained.
        linear: ``weight`` ``[V, H]`` (W_hqᵀ) and ``bias`` ``[V]`` (b_q).
    """

    def __init__(
        self, vocab_size: int, hidden_size: int = 256, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.rnn = TokenRNN(vocab_size, hidden_size, device=device, dtype=dtype)
        self.linear = nn.Linear(hidden_size, vocab_size, device=device, dtype=dtype)
        self.rnn.bias_hh_l0.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from N(0, 0.01²), biases zero: fastrnn's start, drawn by torch's generator."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the next character at every step.

        Args:
            tokens: int32 or int64 ``[T, B]``, in ``[0, V)``.
            hx: the state before, ``[1, B, H]``; zero where None.

        Returns:
            logits ``[T, B, V]`` and the state after, ``[1, B, H]``, to ``detach()`` and carry on.

        Raises:
            ValueError, TypeError, RuntimeError: a token, shape or dtype that does not fit.
        """
        h, h_n = self.rnn(tokens, hx)
        return self.linear(h), h_n


def convert(model: nn.Module) -> nn.Module:
    """Make every ``torch.nn.RNN`` in ``model``, or ``model`` itself, an :class:`RNN`, in place.

    The modules stay the objects they are: their parameters, hooks, names and optimizers are not
    touched, and their results change by rounding alone. Other classes, and subclasses of
    ``torch.nn.RNN``, are left as they are.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if type(module) is nn.RNN:
            module.__class__ = RNN
    return model


def _wide(tensor: Tensor, weight: Tensor) -> Tensor:
    """What autocast made half of, in the dtype of the weights."""
    return tensor.to(weight.dtype) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
