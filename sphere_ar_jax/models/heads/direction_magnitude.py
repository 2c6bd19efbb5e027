"""A flow head for tokens of a direction and a length.

See `docs/method.md`, "Direction and magnitude".

Dimensions:
  B  images
  L  tokens of an image
  m  noisy copies of every token while training
  d  latent dimension; a token has d + 1 numbers
"""

import jax
import jax.numpy as jnp

from sphere_ar_jax.models.heads.flow import FlowHead


class DirectionMagnitude(FlowHead):
    """One flow of d + 1 numbers: those of the direction N_R(z), and the standardised log ‖z‖.

    Tokens are those of the token space 'polar', see `vae.VAE.to_tokens`. The network and the steps
    of the sampler are those of the flow head.

    Attributes:
      magnitude_weight: the weight of the last number's loss.
    """

    magnitude_weight: float = 1.0

    def _scored(
        self, error: jax.Array, end: jax.Array, z: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss mean error_direction + magnitude_weight · mean error_magnitude.

        Args:
          error: squared errors of the velocities (m, B, L, d + 1).
          end: predicted tokens (m, B, L, d + 1).
          z: the tokens, in the same shape.

        Returns:
          (loss, scalars): the loss () float32. The scalars are token_norm, of the directions, and
            magnitude_loss, the mean error of the last number.
        """
        loss, scalars = super()._scored(error[..., :-1], end[..., :-1], z[..., :-1])
        magnitude = jnp.mean(error[..., -1])
        return loss + self.magnitude_weight * magnitude, scalars | {'magnitude_loss': magnitude}
