"""Many nonlinear least-squares problems of one form at a time, within bounds.

A bootstrap solves hundreds of fits of one curve: `scipy.optimize.least_squares` solves one per call, and takes seconds
where a batch takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Residuals = Callable[[NDArray, NDArray], tuple[NDArray, NDArray]]
"""From parameters (A, p) of the problems `rows` (A,) to residuals (A, n) and their derivatives (A, n, p)."""


def levenberg_marquardt(
    residuals: Residuals, theta: NDArray, low: NDArray, high: NDArray, tolerance: float = 1e-9, steps: int = 60
) -> tuple[NDArray, NDArray]:
    """Return the parameters (B, p) that minimise the squares of the residuals from a start, and the squares (B,).

    theta: (B, p), where to begin
    low, high: bounds, of a shape that broadcasts to (B, p); a parameter whose bounds are equal is fixed
    tolerance: share of its squares by which a step of a problem that has converged improves it at most
    """
    low, high = np.broadcast_to(low, theta.shape), np.broadcast_to(high, theta.shape)
    fixed, diagonals = low == high, range(theta.shape[1])
    theta, rows = np.clip(theta, low, high), np.arange(len(theta))
    damping = np.full(len(theta), 1e-2)
    residual, jacobian = residuals(theta, rows)
    loss = (residual**2).sum(1)
    for _ in range(steps):  # rows: of the problems that have not converged
        own = jacobian[rows]
        transposed = own.transpose(0, 2, 1)
        normal = transposed @ own
        gradient = transposed @ residual[rows, :, None]
        normal[:, diagonals, diagonals] *= 1 + damping[rows, None]
        normal[:, diagonals, diagonals] += 1e-12
        step = np.linalg.solve(normal, -gradient)[..., 0]
        step[fixed[rows]] = 0
        trial = np.clip(theta[rows] + np.clip(step, -2, 2), low[rows], high[rows])
        trial_residual, trial_jacobian = residuals(trial, rows)
        trial_loss = (trial_residual**2).sum(1)
        better = trial_loss <= loss[rows]
        converged = better & (loss[rows] - trial_loss <= 1e-12 + tolerance * loss[rows])
        damping[rows] = np.clip(damping[rows] * np.where(better, 0.3, 4), 1e-9, 1e9)
        taken = rows[better]
        theta[taken], residual[taken], jacobian[taken] = trial[better], trial_residual[better], trial_jacobian[better]
        loss[taken] = trial_loss[better]
        rows = rows[~converged]
        if len(rows) == 0:
            break
    return theta, loss
