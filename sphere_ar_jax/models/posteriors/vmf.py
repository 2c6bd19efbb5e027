"""The von Mises–Fisher posterior of the hyperspherical VAE (Davidson et al. 2018).

See `docs/method.md`, "Other posteriors".
"""

import dataclasses
from typing import ClassVar

from sphere_ar_jax.models.posteriors.spherical import Density, Spherical
from sphere_ar_jax.sphere import von_mises_fisher


@dataclasses.dataclass(frozen=True)
class VonMisesFisher(Spherical):
    """x ~ vMF(mu, kappa); for the fields see `Spherical`."""

    DENSITY: ClassVar[Density] = von_mises_fisher
