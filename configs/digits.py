"""SphereAR on scikit-learn's handwritten digits."""

from sphere_ar_jax import config


def get_config(arg=''):
    c = config.default()
    c.vae.update(grid=(4, 4), latent_dim=8, image_channels=1, stem=16, channels=(16, 32, 96), encoder_depth=1, decoder_depth=2, heads=4)
    c.ar.update(depth=3, heads=4, width=96, head_depth=4, head_width=128, head_groups=2, class_tokens=4)
    c.tokenizer_training.update(steps=60, batch_size=64, learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=20, kl_weight=0.001, l2_weight=1.0, log_every=20, checkpoint_every=20)
    c.ar_training.update(steps=60, batch_size=64, learning_rate=2e-3, warmup_steps=20, ema_decay=0.9, log_every=20, checkpoint_every=20)
    c.sampling.update(guidance='linear', guidance_scale=2.0, num_steps=10)
    return c
