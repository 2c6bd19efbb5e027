"""The smallest digits run there is, for tests: --config=tests/tiny_config.py."""

from sphere_ar_jax import config


def get_config():
    """Both stages in a few steps of a few images; quality is none of its business."""
    c = config.default()
    c.vae.update(
        grid=(4, 4),
        latent_dim=8,
        image_channels=1,
        stem=4,
        channels=(4, 8, 16),
        encoder_depth=1,
        decoder_depth=1,
        heads=2,
    )
    c.ar.update(depth=1, heads=2, width=16, head_depth=2, head_width=16, head_groups=1, class_tokens=2)
    training = dict(steps=6, batch_size=16, learning_rate=1e-3, warmup_steps=2, log_every=2, checkpoint_every=2)
    c.tokenizer_training.update(training)
    c.ar_training.update(training, ema_decay=0.9, copies=2)
    c.sampling.update(num_images=40, batch_size=16, num_steps=2, guidance='linear', guidance_scale=1.5)
    return c
