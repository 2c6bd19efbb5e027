"""`python -m sphere_ar_jax.main`, with compiled programs that the processes of a run on CPUs share, for tests.

JAX keys them by the devices; a CPU's differ between the processes, only the first of which writes.
"""

import runpy

from jax._src import cache_key

cache_key._hash_accelerator_config = cache_key._hash_devices
runpy.run_module('sphere_ar_jax.main', run_name='__main__')
