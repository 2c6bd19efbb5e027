"""The tanh-sinh rule beside integrals that are known in closed form."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from sphere_ar_jax.sphere import quadrature

RULE = quadrature.tanh_sinh(1 / 16, -53, 51)


@pytest.mark.parametrize(('a', 'b'), [(1.0, 1.0), (0.5, 0.5), (0.6, 2.5), (8.0, 7.5)])
def test_integrals_with_singular_ends(a, b):
    """∫₀¹ y^(a−1) (1 − y)^(b−1) dy is the beta function, also where the integrand is infinite."""
    logs = (a - 1) * RULE.log_y + (b - 1) * np.log(RULE.one_minus_y) + RULE.log_weight
    np.testing.assert_allclose(np.sum(np.exp(logs)), special.beta(a, b), rtol=1e-8)


def test_nodes_broadcast_with_an_array():
    x = jnp.ones((2, 3))
    found = RULE.beside(x)
    chex.assert_shape(found, (1, 1, len(RULE.log_y)))
    chex.assert_type(found, jnp.float32)
    chex.assert_tree_all_finite(found)
