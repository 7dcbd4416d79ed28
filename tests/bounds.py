"""How far apart two right ways to compute one thing may come out, for tests: the one place that says so, and why.

Kernels differ from one CPU to the next, with the number of threads and with the size of a product: they add in another
order, and so round to other numbers. No bound may be what one machine happened to show. What is compared is the largest
difference, as a share of the tensor's largest value (`tests.reference.relative_error`), and a bound is a power of two
times the number format's step (`eps`), by how far rounding travels:

    SUM          one product, or a table: a sum of a few hundred to a few thousand terms is off by the square root of
                 their number, in steps of half an eps
    EVALUATION   once through a network, or its VAE: some hundred products in a row, which add their errors up
    TRAJECTORY   a guided run of some steps: guidance takes the difference of two evaluations 2 to 10 times, and every
                 step goes on from the error of the one before it

Of each, the worst that was ever seen is below a fifth: 7e-6 of one evaluation between the release's code and this,
2.3e-5 of six steps at guidance 2.5 between two instruction sets of one CPU. In bfloat16 sums are kept in float32 and
only their results are rounded, so errors are a few of its steps from the first layer on, and do not grow as much.

Where both sides run the same kernels on the same shapes they are equal, and tests say so (`torch.equal`). Pixels of 8
bits may differ by one level (`LEVEL`), as what is rounded may lie between two. Near ties (which layer is skipped, which
token is likeliest) are compared where the published numbers say by how much they are apart, or not at all.
"""

import torch

FLOAT32 = torch.finfo(torch.float32).eps
BFLOAT16 = torch.finfo(torch.bfloat16).eps

SUM = 2**5 * FLOAT32  # 4e-6
EVALUATION = 2**10 * FLOAT32  # 1.2e-4
TRAJECTORY = 2**13 * FLOAT32  # 1e-3
LEVEL = 1

OF_EVALUATION = {torch.float32: EVALUATION, torch.bfloat16: 4 * BFLOAT16}
OF_TRAJECTORY = {torch.float32: TRAJECTORY, torch.bfloat16: 4 * BFLOAT16}
OF_DECODING = {torch.float32: EVALUATION, torch.bfloat16: 20 * BFLOAT16}  # random weights blow a VAE's rounding up
