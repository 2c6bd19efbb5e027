"""The public PyTorch code as a second side of the benchmark: built from a checkout, on our weights,
part by part.

Nothing of that code is here: a checkout of guolinke/SphereAR is imported from where it lies. Where
flash_attn is not installed (it needs a GPU), the one function taken from it is replaced by torch's
own scaled_dot_product_attention. Sizes that the public constructors do not offer (the digits') are
made by exchanging layers after construction.
"""

import copy
import os
import sys
import types

import numpy as np

from sphere_ar_jax.config import build
from sphere_ar_jax.measure import our_parts


def _import(checkout, compiled):
    """(torch, the public modules by name). Must come before anything else imports torch."""
    if not compiled:
        os.environ['TORCHDYNAMO_DISABLE'] = '1'
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        True  # as its scripts, and JAX, have it
    )
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType('flash_attn')

        def flash_attn_func(q, k, v, causal=False, dropout_p=0.0):
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, dropout_p=dropout_p
            )
            return out.transpose(1, 2)

        stand_in.flash_attn_func = flash_attn_func
        sys.modules['flash_attn'] = stand_in
    sys.path.insert(0, checkout)
    from SphereAR import layers, model, vae

    return torch, types.SimpleNamespace(layers=layers, model=model, vae=vae)


def _set_heads(transformer_layers, heads):
    for layer in transformer_layers:
        a = layer.attention
        a.n_head, a.head_dim, a.scale = heads, a.dim // heads, (a.dim // heads) ** -0.5


def _build_vae(torch, public, vae):
    """The public tokenizer in the sizes of ours."""
    nn, size, D = torch.nn, vae.image_shape[0], vae.backbone.channels[-1]
    if D < 64:
        raise ValueError(
            f'the public tokenizer has one head for every 64 of its width, which is {D} here'
        )
    model = public.vae.VAE(
        latent_dim=vae.latent_dim, image_size=size, patch_size=vae.backbone.patch_size, z_channels=D,
        cnn_chs=[*vae.backbone.channels[:-1], D], encoder_vit_layers=vae.backbone.encoder_depth,
        decoder_vit_layers=vae.backbone.decoder_depth,
    )  # fmt: skip
    if (
        vae.backbone.channels[0] != 64
        or vae.backbone.stem != 64
        or vae.backbone.image_channels != 3
    ):
        c, first = vae.backbone.image_channels, vae.backbone.channels[0]
        model.encoder.conv_in = nn.Conv2d(c, vae.backbone.stem, 3, 1, 1, bias=False)
        model.decoder.conv_out = nn.Sequential(
            nn.GroupNorm(min(32, first // 4), first, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(first, c, 3, 1, 1, bias=False),
        )
    for part in (model.encoder, model.decoder):
        _set_heads(part.layers, vae.backbone.heads)
        positions, width = (
            public.layers.get_2d_pos(size, vae.backbone.patch_size),
            D // vae.backbone.heads,
        )
        part.freqs_cis = public.layers.precompute_freqs_cis_2d(
            positions, width, cls_token_num=4
        ).clone()
    return model


def _build(torch, public, ar, vae):
    """The public SphereAR in the sizes of ours, tokenizer included."""
    model = public.model.SphereAR(
        dim=ar.width, n_layer=ar.depth, n_head=ar.heads, diff_layers=ar.head.depth, diff_dim=ar.head.width,
        diff_adanln_layers=ar.head.groups, latent_dim=ar.latent_dim, patch_size=vae.backbone.patch_size,
        resolution=vae.image_shape[0], diff_batch_mul=4, cls_token_num=ar.condition.length,
        num_classes=ar.condition.num_classes,
    )  # fmt: skip
    model.vae = _build_vae(torch, public, vae)
    model.freeze_vae()
    return model


def _train(torch, model, cfg, vae_only, images, labels):
    """One optimizer step of the public recipe without its adversarial and perceptual terms, as a
    function.
    """
    model.train()
    if vae_only:
        model.vae.requires_grad_(True)
    else:
        model.vae.eval()
    model.vae_only = vae_only
    # in vae_only mode the public constructor makes no AR model: nothing of it may be updated or
    # averaged here either
    trained = model.vae if vae_only else model
    parameters = [p for p in trained.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    ema_decay = (cfg.tokenizer_training if vae_only else cfg.ar_training).ema_decay
    averaged = copy.deepcopy(parameters) if ema_decay else None
    forward = torch.compile(model)

    def step():
        loss, kl, recon = forward(images, labels)
        if vae_only:
            error = recon - images
            loss = error.abs().mean() + 0.004 * kl
            if cfg.tokenizer_training.l2_weight:
                loss = loss + cfg.tokenizer_training.l2_weight * error.square().mean()
        tx.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        tx.step()
        if averaged is not None:
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - ema_decay)
        return loss

    return step


# What a part does not use of the model, by attribute: gone before anything is measured.
_UNUSED = {
    'prefill': ('vae', 'head'),
    'transformer': ('vae', 'head'),
    'head': ('layers', 'cls_embedding'),
    **dict.fromkeys(
        ('decode', 'encode', 'train_tokenizer'),
        ('layers', 'head', 'cls_embedding', 'pos_for_diff', 'proj_in'),
    ),
}


def part(checkout, compiled, cfg, name, batch, weights):
    """One part of the benchmark on the public code: (function that runs it once and returns an
    array, function that says the peak memory of the accelerator in bytes, None on a CPU).

    Args:
      checkout: directory of the public repository. compiled: whether its torch.compile is left on.
        cfg: for sizes and
      settings. name: see `our_parts.PARTS`. batch: images. weights: file of {PyTorch name: array}.
    Raises ValueError where a weight is missing.
    """
    ar, vae = build.build_ar(cfg), build.build_vae(cfg)
    inputs = our_parts.inputs(ar, vae, batch)
    torch, public = _import(checkout, compiled)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    half = torch.autocast(device, torch.bfloat16, enabled=cfg.dtype == 'bfloat16')
    model = _build(torch, public, ar, vae)
    for attribute in _UNUSED.get(name, ()):
        delattr(model, attribute)
    state = model.state_dict()
    with np.load(weights) as tensors, torch.no_grad():
        for key in state:
            if key in tensors:
                state[key].copy_(torch.from_numpy(tensors[key]))
            elif not key.endswith('freqs_cis'):
                raise ValueError(f'no weights for {key}')
    model = model.to(device, memory_format=torch.channels_last)
    model.diff_batch_mul = cfg.ar_training.copies
    put = lambda a: torch.tensor(np.asarray(a)).to(device)
    nchw = lambda a: put(np.asarray(a).transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last)
    images, labels, z, condition = (
        nchw(inputs['images']),
        *(put(inputs[n]) for n in ('labels', 'z', 'condition')),
    )
    labels = labels.long()
    steps, schedule, scale = (
        cfg.sampling.num_steps,
        cfg.sampling.guidance,
        cfg.sampling.guidance_scale,
    )

    def prefill():
        rows = torch.cat([labels, torch.full_like(labels, ar.condition.num_classes)])
        embedded = model.cls_embedding(rows).view(2 * batch, ar.condition.length, -1)
        return model.forward_model(embedded, 0, ar.condition.length)[:, -1]

    def transformer():
        c = []
        for k in our_parts.positions(ar.num_tokens):
            start = ar.condition.length + k - 1
            last = model.proj_in(torch.cat([z[:, k - 1 : k]] * 2))
            c.append(model.forward_model(last, start, start + 1)[:, 0])
        return torch.stack(c, 1)

    def head(c=condition):
        return model.head_sample(c[:, None], 1, steps, scale, schedule)[:, 0]

    if name.startswith('train'):
        step = _train(torch, model, cfg, name == 'train_tokenizer', images, labels)
        run = lambda: step()[None]
    else:
        model.eval()
        if name in ('prefill', 'transformer', 'sample', *our_parts.STARTS):
            model.enable_kv_cache(2 * batch)
        run = {
            'prefill': prefill,
            'transformer': transformer,
            'head': head,
            'decode': lambda: model.vae.decode(z).permute(0, 2, 3, 1),
            'encode': lambda: model.vae.encode(images)[0],
            **dict.fromkeys(our_parts.STARTS, lambda: head(prefill())),
            'sample': lambda: model.sample(labels, steps, scale, schedule).permute(0, 2, 3, 1),
        }[name]
        if name == 'transformer':
            with torch.no_grad(), half:
                prefill()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()

    def synchronised():
        with half, torch.set_grad_enabled(name.startswith('train')):
            out = run()
        return out.detach().float().cpu().numpy()  # waits for the device

    return synchronised, torch.cuda.max_memory_allocated if device == 'cuda' else lambda: None
