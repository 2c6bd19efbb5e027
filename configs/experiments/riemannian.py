r"""Open question 1 at small size: a head that never leaves the sphere.

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/riemannian.py
Result:    On the digits the Riemannian head draws better images with 1, 2, 4 and 8 evaluations,
           each row at its best guidance, and for more it is undecided. At guidance 1.5 it draws
           better ones with 1, and for all others it is undecided. Its stochastic solver draws worse
           ones where all noise is replaced, and where 5% or 20% is it is undecided
           (docs/experiments/riemannian/page.md). On Fashion-MNIST the head draws better images with
           1 and 2 evaluations, each row at its best guidance, and for 4, 8 and 16 it is undecided.
           At guidance 1.5 straight paths draw better ones with 4, 8 and 16
           (docs/experiments/riemannian_fashion/page.md).

The flow head and the Riemannian head draw tokens of the same tokenizers with 1 to 100 evaluations,
by Adams–Bashforth and by a stochastic solver of each. All rows of a head share one model.

The rows riemannian_eta_… were added after the other verdicts, since the stochastic solver draws
poor images where all noise is replaced at each step (η = 1). They replace 5% and 20% of it. Their
models were trained once more. Comparisons at the common guidance 1.5, and those of two evaluations
with four, were added after the verdicts at each row's best guidance.

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, up to 16
evaluations, and no stochastic solvers. smoke shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments

EVALUATIONS = (1, 2, 4, 8, 16, 32, 100)
FASHION_EVALUATIONS = EVALUATIONS[:5]
HEADS = ('flow', 'riemannian')
STOCHASTIC = (
    'The stochastic solvers have 32 evaluations; Euler–Maruyama makes one more than it has steps. '
    'Rows named eta replace 5% and 20% of the noise at each step. They were added after the other '
    'verdicts, with tokenizers and models trained once more. '
)
# η of further rows of the stochastic solver, in percent. Its own row has η = 1.
LESS_NOISE = (5, 20)


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    fashion = 'fashion' in arg.split(',')
    c = experiments.start(
        'riemannian',
        arg,
        'Head: straight paths or geodesics?',
        more='' if fashion else STOCHASTIC,
        sampler='ab2 with as many evaluations as stand behind a head’s name',
    )
    c.claim = (
        'A flow that follows the geodesics of the sphere needs fewer evaluations of the head than '
        'one of straight paths that is projected at its end.'
    )
    c.caveat = (
        'What would change it: more dimensions, in which noise and token are nearly orthogonal, '
        'and tokens whose posterior is narrower.'
    )
    evaluations = FASHION_EVALUATIONS if fashion else EVALUATIONS
    c.rows = experiments.rows()
    for n in evaluations:
        for head in HEADS:
            sampling = {'solver': 'ab2', 'num_steps': n, 'shift': None}
            c.rows[f'{head}_{n}'] = {'ar': {'head': head}, 'sampling': sampling}
    c.comparisons = tuple(f'riemannian_{n} flow_{n} frechet_best' for n in evaluations)
    c.comparisons += tuple(f'riemannian_{n} flow_{n} frechet_common' for n in evaluations)
    c.comparisons += ('riemannian_2 flow_4 frechet_best', 'riemannian_2 flow_4 frechet_common')
    if not fashion:
        _add_stochastic(c)
    c.curves = {head: tuple(f'{head}_{n}' for n in evaluations) for head in HEADS}
    c.curves_at = evaluations
    c.curves_over = 'evaluations of the head'
    c.guidance_scales = (1.0, 1.5, 2.0, 3.0)
    return experiments.finish(c, arg)


def _add_stochastic(c: ConfigDict) -> None:
    """Add the rows of the stochastic solvers, 32 evaluations each, and their comparisons."""
    # Euler–Maruyama makes one evaluation more than it has steps.
    for head, solver, steps in (('flow', 'euler_maruyama', 31), ('riemannian', 'mixing', 32)):
        sampling = {'solver': solver, 'num_steps': steps, 'shift': None}
        c.rows[f'{head}_stochastic'] = {'ar': {'head': head}, 'sampling': sampling}
    for percent in LESS_NOISE:
        sampling = {**c.rows.riemannian_stochastic.sampling, 'noise_scale': percent / 100}
        c.rows[f'riemannian_eta_{percent}'] = {'ar': {'head': 'riemannian'}, 'sampling': sampling}
    c.comparisons += (
        'riemannian_stochastic flow_stochastic frechet_best',
        *(f'riemannian_eta_{n} flow_stochastic frechet_best' for n in LESS_NOISE),
        *(f'riemannian_eta_{n} riemannian_32 frechet_best' for n in LESS_NOISE),
    )
