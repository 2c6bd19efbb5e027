"""A flow head whose paths are geodesics of the sphere.

See `docs/method.md`, "Riemannian head". Network, loss and sampler are those of the flow head.
"""

from typing import ClassVar

from sphere_ar_jax.flow import paths
from sphere_ar_jax.models.heads.flow import FlowHead


class Riemannian(FlowHead):
    """A flow head along geodesics: x₀ is uniform on the sphere, and x_t never leaves it.

    The velocity is the network's output, projected to the tangent space at x_t. Tokens must lie on
    the sphere of the head's radius.
    """

    PATH: ClassVar[type[paths.Straight | paths.Geodesic]] = paths.Geodesic
