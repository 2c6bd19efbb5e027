"""Class labels as a condition; the null class stands for no label."""

import jax
import jax.numpy as jnp


def drop_labels(keys, class_id, null_class, probability):
    """class_id (B,) with each label replaced by the null class with the given probability; keys (B,). Spec §8."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(dropped, null_class, class_id)
