"""The power-spherical posterior of the S-VAE (paper §3.2; `docs/method.md`, "Posterior")."""

import dataclasses
from typing import ClassVar

from sphere_ar_jax.models.posteriors.spherical import Density, Spherical
from sphere_ar_jax.sphere import power_spherical


@dataclasses.dataclass(frozen=True)
class PowerSpherical(Spherical):
    """The published family: x ~ PowerSpherical(mu, kappa); for the fields see `Spherical`."""

    DENSITY: ClassVar[Density] = power_spherical
