"""What experiments measure of a trained row and seed, by the word `kind` of their config."""

from sphere_ar_jax.experiments import report
from sphere_ar_jax.experiments.kinds import captions, comparison, propagation, shifted

KINDS: dict[str, report.Kind] = {
    'comparison': comparison.KIND,
    'propagation': propagation.KIND,
    'shifted': shifted.KIND,
    'captions': captions.KIND,
}
