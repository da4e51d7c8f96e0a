"""The Triton kernels: one file a kernel, ``blocks.py`` with what they share, ``configs.py`` with their block shapes.

    normalize.py      statistics of every feature, A_hat and B_hat, c = diag(C)
    gram.py           K_a, K_b, <K_a, K_b>, and the terms
    correlate.py      C without its diagonal, its sums, and the terms
    gram_grad.py      the input gradients of the Gram route, where N is one tile
    grad_product.py   the same where N is several tiles
    direct_grad.py    the input gradients of the direct route

What each launches, and with which arguments, stands in ``triton_backend.py``.
"""
