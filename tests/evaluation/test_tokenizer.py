import numpy as np

from sphere_ar_jax.evaluation import tokenizer


def test_psnr():
    a = np.zeros((2, 4, 4, 1))
    np.testing.assert_allclose(tokenizer.psnr(a, a + 0.2), 20, rtol=1e-6)
