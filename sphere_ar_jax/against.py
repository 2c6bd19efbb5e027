"""The public PyTorch code as a second side of the benchmark: built from a checkout, on our weights, part by part.

Nothing of that code is here: a checkout of guolinke/SphereAR is imported from where it lies. Where flash_attn is not
installed (it needs a GPU), the one function taken from it is replaced by torch's own scaled_dot_product_attention.
Sizes that the public constructors do not offer (the digits') are made by exchanging layers after construction.
"""

import copy
import os
import sys
import types

import numpy as np


def _import(checkout, compiled):
    """(torch, the public modules by name). Must come before anything else imports torch."""
    if not compiled:
        os.environ['TORCHDYNAMO_DISABLE'] = '1'
    import torch

    try:
        import flash_attn  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType('flash_attn')

        def flash_attn_func(q, k, v, causal=False, dropout_p=0.0):
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout_p)
            return out.transpose(1, 2)

        stand_in.flash_attn_func = flash_attn_func
        sys.modules['flash_attn'] = stand_in
    sys.path.insert(0, checkout)
    from SphereAR import diff_head, layers, model, vae

    return torch, types.SimpleNamespace(diff_head=diff_head, layers=layers, model=model, vae=vae)


def _set_heads(transformer_layers, heads):
    for layer in transformer_layers:
        a = layer.attention
        a.n_head, a.head_dim, a.scale = heads, a.dim // heads, (a.dim // heads) ** -0.5


def _build_vae(torch, public, vae):
    """The public tokenizer in the sizes of ours."""
    nn, size, D = torch.nn, vae.image_shape[0], vae.channels[-1]
    model = public.vae.VAE(
        latent_dim=vae.latent_dim, image_size=size, patch_size=vae.patch_size, z_channels=max(D, 64),
        cnn_chs=[*vae.channels[:-1], max(D, 64)], encoder_vit_layers=vae.encoder_depth,
        decoder_vit_layers=vae.decoder_depth,
    )  # fmt: skip
    if vae.channels[0] != 64 or vae.stem != 64 or vae.image_channels != 3:
        c, first = vae.image_channels, vae.channels[0]
        model.encoder.conv_in = nn.Conv2d(c, vae.stem, 3, 1, 1, bias=False)
        model.decoder.conv_out = nn.Sequential(
            nn.GroupNorm(min(32, first // 4), first, eps=1e-6), nn.SiLU(), nn.Conv2d(first, c, 3, 1, 1, bias=False)
        )
    for part in (model.encoder, model.decoder):
        _set_heads(part.layers, vae.heads)
        positions = public.layers.get_2d_pos(size, vae.patch_size)
        part.freqs_cis = public.layers.precompute_freqs_cis_2d(positions, D // vae.heads, cls_token_num=4).clone()
    return model


def _build(torch, public, ar, vae):
    """The public SphereAR in the sizes of ours, tokenizer included."""
    model = public.model.SphereAR(
        dim=ar.width, n_layer=ar.depth, n_head=ar.heads, diff_layers=ar.head_depth, diff_dim=ar.head_width,
        diff_adanln_layers=ar.head_groups, latent_dim=ar.latent_dim, patch_size=vae.patch_size,
        resolution=vae.image_shape[0], diff_batch_mul=4, cls_token_num=ar.class_tokens, num_classes=ar.num_classes,
    )  # fmt: skip
    model.vae = _build_vae(torch, public, vae)
    model.freeze_vae()
    return model


def _train(torch, model, vae_only, images, labels, options):
    """One optimizer step of the public recipe without its adversarial and perceptual terms, as a function."""
    model.train()
    if vae_only:
        model.vae.requires_grad_(True)
    else:
        model.vae.eval()
    model.vae_only = vae_only
    # in vae_only mode the public constructor makes no AR model: nothing of it may be updated or averaged here either
    trained = model.vae if vae_only else model
    parameters = [p for p in trained.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    averaged = copy.deepcopy(parameters) if options['ema_decay'] else None
    forward = torch.compile(model)

    def step():
        loss, kl, recon = forward(images, labels)
        if vae_only:
            error = recon - images
            loss = error.abs().mean() + 0.004 * kl
            loss = loss + options['l2_weight'] * error.square().mean() if options['l2_weight'] else loss
        tx.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        tx.step()
        if averaged is not None:
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - options['ema_decay'])
        return loss

    return step


def part(checkout, compiled, name, ar, vae, tensors, batch, num_steps, scale, options, inputs, positions):
    """One part of the benchmark on the public code: (function that runs it once and returns an array, function that
    says the peak memory of the accelerator in bytes, None on a CPU).

    Args:
      checkout: directory of the public repository. compiled: whether its torch.compile is left on. name: see
      `parts.PARTS`. ar, vae: our models, for their sizes. tensors: {PyTorch name: array} of all weights.
      batch, num_steps, scale: images, solver steps, guidance scale. options: of the training.
      inputs: the arrays that our side gets, by name. positions: the tokens that the transformer is timed at.
    """
    torch, public = _import(checkout, compiled)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    half = torch.autocast(device, torch.bfloat16, enabled=options['bfloat16'])
    model = _build(torch, public, ar, vae)
    wanted = {k for k, v in model.state_dict().items() if not k.endswith('freqs_cis')}
    model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items() if k in wanted}, strict=False)
    if wanted - set(tensors):
        raise ValueError(f'no weights for {sorted(wanted - set(tensors))[:4]}')
    model = model.to(device, memory_format=torch.channels_last)
    model.diff_batch_mul = options['copies']
    put = lambda a: torch.tensor(np.asarray(a)).to(device)
    nchw = lambda a: put(np.asarray(a).transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last)

    if name.startswith('train'):
        step = _train(
            torch, model, name == 'train_tokenizer', nchw(inputs['images']), put(inputs['labels']).long(), options
        )
        run = lambda: step()[None]
    else:
        model.eval()
        labels = put(inputs['labels']).long()
        rows = torch.cat([labels, torch.full_like(labels, ar.num_classes)])
        z = put(inputs['z'])
        embedded = model.cls_embedding(rows).view(2 * batch, ar.class_tokens, -1).detach()
        model.enable_kv_cache(2 * batch)

        def transformer():
            c = []
            for k in positions:
                start = ar.class_tokens + k - 1
                last = model.proj_in(torch.cat([z[:, k - 1 : k]] * 2))
                c.append(model.forward_model(last, start, start + 1)[:, 0])
            return torch.stack(c, 1)

        def first_token():
            c = model.forward_model(embedded, 0, ar.class_tokens)
            return model.head_sample(c[:, -1:], 0, num_steps, scale, 'constant')[:, 0]

        run = {
            'prefill': lambda: model.forward_model(embedded, 0, ar.class_tokens)[:, -1],
            'transformer': transformer,
            'head': lambda: model.head_sample(put(inputs['condition'])[:, None], 1, num_steps, scale)[:, 0],
            'decode': lambda: model.vae.decode(z).permute(0, 2, 3, 1),
            'encode': lambda: model.vae.encode(nchw(inputs['images']))[0],
            'cold': first_token,
            'sample': lambda: model.sample(labels, num_steps, scale, 'constant').permute(0, 2, 3, 1),
        }[name]
        if name == 'transformer':
            with torch.no_grad(), half:
                model.forward_model(embedded, 0, ar.class_tokens)

    def synchronised():
        with half, torch.set_grad_enabled(name.startswith('train')):
            out = run()
        if device == 'cuda':
            torch.cuda.synchronize()
        return out.detach().float().cpu().numpy()

    return synchronised, (lambda: torch.cuda.max_memory_allocated()) if device == 'cuda' else (lambda: None)
