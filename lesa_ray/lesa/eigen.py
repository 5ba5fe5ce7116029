"""Eigenvectors of Gram matrices of any size: which solver takes them, on a GPU and on the host."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lesa_ray.errors import first_line
from lesa_ray.gpu import fits_device
from lesa_ray.lesa.bounds import CUSOLVER_ROWS, SPLIT_MATRICES, SYEVD_ROWS
from lesa_ray.lesa.split_eigh import split_eigh

log = logging.getLogger(__name__)


def eigenvectors(gram: Tensor) -> Tensor:
    """All of a symmetric matrix, (n, n) float64 by its lower triangle, as columns, ascending: (n, n), on the matrix'
    device or in host memory. The matrix is used up.

    eigh, which wants columns, leaves its vectors in the matrix, so that the peak is three times n² doubles, with
    LAPACK's workspace, and not four.
    """
    columns = gram.mT
    if not gram.is_cuda and len(gram) > SYEVD_ROWS:
        import scipy.linalg

        # By relatively robust representations: a workspace of 26·n, and vectors beside the matrix.
        _, vectors = scipy.linalg.eigh(columns.numpy(), lower=False, driver="evr", overwrite_a=True, check_finite=False)
        return torch.from_numpy(vectors)
    try:
        found: Tensor = torch.linalg.eigh(columns, UPLO="U", out=(gram.new_empty(len(gram)), columns)).eigenvectors
    except RuntimeError as error:
        # What cuSOLVER of CUDA 12 says, before it has changed anything, of matrices that are too large for it.
        if not gram.is_cuda or "CUSOLVER_STATUS_INVALID_VALUE" not in str(error):
            raise
        found = _in_parts(gram, CUSOLVER_ROWS)
    return found


def _in_parts(gram: Tensor, most: int) -> Tensor:
    """The same where at most `most` rows can be solved at once: on the device, if it has room for that, else on the
    host."""
    try:
        if fits_device((SPLIT_MATRICES - 1) * 8 * len(gram) ** 2, str(gram.device)):
            return split_eigh(gram.tril() + gram.tril(-1).mT, most)[1]
        why = "the GPU has no room to split it"
    except RuntimeError as error:  # a SplitError, no memory after all, or another size that a library refuses
        why = first_line(error)
    log.warning(
        "cuSOLVER does not take a matrix of %d rows, and %s; eigh runs on the host with %d threads (--cpus-per-task)",
        len(gram), why, torch.get_num_threads(),
    )  # fmt: skip
    return eigenvectors(gram.cpu())
