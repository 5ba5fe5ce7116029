"""Sizes at which the core changes how it works. What works by them and what reckons with them share them here."""

from __future__ import annotations

GRAM_BLOCK = {"cpu": 256, "cuda": 2048}
"""Rows of G summed at once."""
EIGH_MATRICES = 3
"""d1² doubles at the peak of eigh: the matrix, in which the eigenvectors come back, and a workspace of two."""
CUSOLVER_ROWS = 23_000
"""Rows that the eigensolver of every cuSOLVER takes; that of CUDA 13 takes more."""
SPLIT_MATRICES = 6
"""d1² doubles at the peak where a larger matrix is split (`split_eigh`), the matrix among them. Reckoned with whichever
CUDA there is, as estimates do not know it."""
SYEVD_ROWS = 32_766
"""Rows of the largest matrix that LAPACK's syevd takes: its 2·d1² words of workspace are counted in 32 bits. With more
PyTorch 2.13 dies of a segmentation fault (pytorch/pytorch, issue 92141)."""
RIDGE_FEATURES = {"cpu": 8192, "cuda": 32768}
"""2·d2 up to which ridge is a yardstick: the system takes 0.5 GB in float64 and 200 GFLOP to solve; on a GPU 8.6 GB,
twice while solving."""
RIDGE_BLOCK = 256
"""Rows at once where ridge's system is added up, factorised and solved, all in the system's own memory."""
SCORED = 4
"""Training triples that are scored where fewer are held out. Predicting one by ridge takes nearly as long as adding it
to the normal equations: with all of them the fit would take almost twice as long."""
STACKED_ON = ("cuda",)
"""Kinds of device on which predictors of one shape are trained side by side; on others one after another: on a CPU core
one step of many takes 1.0 to 1.4 times as long as a step of each (at d2 = 256 to 2,048, 4 to 16 of them; measured),
since a single predictor stays in the cache and its products are at the core's peak already."""
EXACT = 4096
"""Rows up to which layers are matched by the exact assignment: two seconds, and costs of 134 MB in float64."""
