"""A GRU over jagged sequences for the CPU: no padding is computed, and its backward is written out (Cho et al. 2014).

torch's own either computes padding or, packed, takes twice the time on a CPU. Here tokens are ordered by position,
longest sequences first, so that the tokens of a step lie beside each other; what does not depend on the step before is
one matrix product over all tokens. On a GPU cuDNN does all this.

Legend: N real tokens ordered so, A sequences that reach a position, D width; gates r (reset), z (update), c
(candidate).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


def gru(x_ND: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, active: Sequence[int]) -> Tensor:
    """States of a GRU that starts at 0: [N, D], in the order of x.

    active: how many sequences reach each position, falling. Weights as torch's GRU has them: rows of r, z, c.
    """
    states_ND: Tensor = _Gru.apply(x_ND, w_ih, w_hh, b_ih, b_hh, active)
    return states_ND


class _Gru(torch.autograd.Function):
    """r, z = σ(W x + b + U h + b'); i = U_c h + b'_c; c = tanh(W_c x + b_c + r ⊙ i); h ← c + z ⊙ (h − c)"""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, active: Sequence[int]
    ) -> Tensor:
        d = w_hh.shape[1]
        bias, bias_c = torch.cat((b_ih[: 2 * d] + b_hh[: 2 * d], b_ih[2 * d :])), b_hh[2 * d :]
        gates_ND, u = torch.addmm(bias, x_ND, w_ih.T), w_hh.T.contiguous()
        inner_ND, before_ND, h_ND = (x_ND.new_empty(len(x_ND), d) for _ in range(3))
        end = 0
        for step, count in enumerate(active):
            start, end = end, end + count
            rz_AD, c_AD = gates_ND[start:end, : 2 * d], gates_ND[start:end, 2 * d :]
            before_AD, inner_AD = before_ND[start:end], inner_ND[start:end]
            before_AD.copy_(h_ND[start - active[step - 1] :][:count]) if step else before_AD.zero_()
            recurrent_AD = before_AD @ u
            torch.add(recurrent_AD[:, 2 * d :], bias_c, out=inner_AD)
            rz_AD.add_(recurrent_AD[:, : 2 * d]).sigmoid_()
            c_AD.addcmul_(rz_AD[:, :d], inner_AD).tanh_()
            torch.lerp(c_AD, before_AD, rz_AD[:, d:], out=h_ND[start:end])
        ctx.save_for_backward(x_ND, w_ih, w_hh, gates_ND, inner_ND, before_ND)
        ctx.active = active
        return h_ND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = grad_outputs
        x_ND, w_ih, w_hh, gates_ND, inner_ND, before_ND = ctx.saved_tensors
        active, d = ctx.active, w_hh.shape[1]
        # Gradients before the gates' functions, [i, r, z, c]: the first three meet U, the last three W.
        to_ND = x_ND.new_empty(len(x_ND), 4 * d)
        u = torch.cat((w_hh[2 * d :], w_hh[: 2 * d]))
        carry_AD, start = grad_ND.new_zeros(0, d), len(x_ND)
        for step in range(len(active) - 1, -1, -1):
            start, end = start - active[step], start
            r_AD, z_AD, c_AD = gates_ND[start:end].split(d, dim=1)
            to_i_AD, to_r_AD, to_z_AD, to_c_AD = to_ND[start:end].split(d, dim=1)
            dh_AD = grad_ND[start:end].clone()
            dh_AD[: len(carry_AD)] += carry_AD
            kept_AD = dh_AD * z_AD
            to_z_AD.copy_(_sigmoid_backward((before_ND[start:end] - c_AD).mul_(dh_AD), z_AD))
            to_c_AD.copy_(_tanh_backward(dh_AD.sub_(kept_AD), c_AD))
            to_r_AD.copy_(_sigmoid_backward(to_c_AD * inner_ND[start:end], r_AD))
            torch.mul(to_c_AD, r_AD, out=to_i_AD)
            if step:
                carry_AD = torch.addmm(kept_AD, to_ND[start:end, : 3 * d], u)
        to_u_ND, to_w_ND = to_ND[:, : 3 * d], to_ND[:, d:]
        grad_u, grad_b = to_u_ND.T @ before_ND, to_ND.sum(0)
        return (
            to_w_ND @ w_ih if ctx.needs_input_grad[0] else None,
            to_w_ND.T @ x_ND,
            torch.cat((grad_u[d:], grad_u[:d])),
            grad_b[d:],
            torch.cat((grad_b[d : 3 * d], grad_b[:d])),
            None,
        )
