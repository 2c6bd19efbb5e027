"""The public PyTorch code as a second side of the benchmark, on our weights, part by part.

Nothing of that code is here: a checkout of guolinke/SphereAR is imported from where it lies. Where
flash_attn is not installed (it needs a GPU), torch's own scaled_dot_product_attention replaces the
one function taken from it. Sizes that the public constructors do not offer, such as those of the
digits, are made by exchanging layers after construction.

torch must be imported late, so that functions below take the module as the argument `torch`.
"""

import copy
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sphere_ar_jax.config import build
from sphere_ar_jax.measure import our_parts
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.backbones import Hybrid
from sphere_ar_jax.models.conditions import Classes
from sphere_ar_jax.models.heads import FlowHead
from sphere_ar_jax.models.vae import VAE


def _import(checkout: str, compiled: bool) -> tuple[types.ModuleType, types.SimpleNamespace]:
    """Imports torch and the public modules, which it returns by name.

    It must be called before anything else imports torch, which reads the environment at its import.
    `compiled` says whether the public code's torch.compile is left on.
    """
    if not compiled:
        os.environ['TORCHDYNAMO_DISABLE'] = '1'
    import torch

    # The public scripts allow TF32, and JAX does by default.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    try:
        import flash_attn  # noqa: F401
    except ImportError:

        def flash_attn_func(
            q: Any, k: Any, v: Any, causal: bool = False, dropout_p: float = 0.0
        ) -> Any:
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, dropout_p=dropout_p
            )
            return out.transpose(1, 2)

        stand_in: Any = types.ModuleType('flash_attn')
        stand_in.flash_attn_func = flash_attn_func
        sys.modules['flash_attn'] = stand_in
    sys.path.insert(0, checkout)
    from SphereAR import layers, model, vae

    return torch, types.SimpleNamespace(layers=layers, model=model, vae=vae)


def _set_heads(transformer_layers: Iterable[Any], heads: int) -> None:
    """Gives public transformer blocks another number of attention heads."""
    for layer in transformer_layers:
        attention = layer.attention
        attention.n_head = heads
        attention.head_dim = attention.dim // heads
        attention.scale = attention.head_dim**-0.5


def _build_vae(torch: types.ModuleType, public: types.SimpleNamespace, vae: VAE) -> Any:
    """The public tokenizer in the sizes of ours."""
    nn = torch.nn
    backbone = vae.backbone
    assert isinstance(backbone, Hybrid), 'the public code has this backbone only'
    size = vae.image_shape[0]
    width = backbone.channels[-1]
    if width < 64:
        raise ValueError(
            f'the public tokenizer has one head for every 64 of its width, which is {width} here'
        )
    model = public.vae.VAE(
        latent_dim=vae.latent_dim,
        image_size=size,
        patch_size=backbone.patch_size,
        z_channels=width,
        cnn_chs=[*backbone.channels[:-1], width],
        encoder_vit_layers=backbone.encoder_depth,
        decoder_vit_layers=backbone.decoder_depth,
    )
    colours = backbone.image_channels
    first = backbone.channels[0]
    if first != 64 or backbone.stem != 64 or colours != 3:
        model.encoder.conv_in = nn.Conv2d(colours, backbone.stem, 3, 1, 1, bias=False)
        model.decoder.conv_out = nn.Sequential(
            nn.GroupNorm(min(32, first // 4), first, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(first, colours, 3, 1, 1, bias=False),
        )
    positions = public.layers.get_2d_pos(size, backbone.patch_size)
    head_dim = width // backbone.heads
    for part in (model.encoder, model.decoder):
        _set_heads(part.layers, backbone.heads)
        table = public.layers.precompute_freqs_cis_2d(positions, head_dim, cls_token_num=4)
        part.freqs_cis = table.clone()
    return model


def _num_classes(ar: AR) -> int:
    """The number of classes of an AR model, whose condition must be classes."""
    assert isinstance(ar.condition, Classes), 'the public code has classes only'
    return ar.condition.num_classes


def _build(torch: types.ModuleType, public: types.SimpleNamespace, ar: AR, vae: VAE) -> Any:
    """The public SphereAR in the sizes of ours, tokenizer included."""
    assert isinstance(ar.head, FlowHead), 'the public code has this head only'
    model = public.model.SphereAR(
        dim=ar.width,
        n_layer=ar.depth,
        n_head=ar.heads,
        diff_layers=ar.head.depth,
        diff_dim=ar.head.width,
        diff_adanln_layers=ar.head.groups,
        latent_dim=ar.latent_dim,
        patch_size=vae.backbone.patch_size,
        resolution=vae.image_shape[0],
        diff_batch_mul=4,
        cls_token_num=ar.condition.length,
        num_classes=_num_classes(ar),
    )
    model.vae = _build_vae(torch, public, vae)
    model.freeze_vae()
    return model


def _load(torch: types.ModuleType, model: Any, weights: str | os.PathLike[str]) -> None:
    """Copies weights from a .npz file into a public model. Raises ValueError if one is missing."""
    state = model.state_dict()
    with np.load(weights) as tensors, torch.no_grad():
        for key in state:
            if key in tensors:
                state[key].copy_(torch.from_numpy(tensors[key]))
            elif not key.endswith('freqs_cis'):
                raise ValueError(f'no weights for {key}')


def _train(
    torch: types.ModuleType, model: Any, cfg: ConfigDict, vae_only: bool, images: Any, labels: Any
) -> Callable[[], Any]:
    """One optimizer step of the public recipe, as a function that returns the loss.

    With `vae_only` the tokenizer is trained, otherwise the AR model. The tokenizer's adversarial
    and perceptual terms are left out (`docs/method.md`, "Tokenizer losses" and "Optimizer"). Images
    are (B, c, H, W).
    """
    model.train()
    if vae_only:
        model.vae.requires_grad_(True)
    else:
        model.vae.eval()
    model.vae_only = vae_only
    # In vae_only mode the public constructor makes no AR model, so that none may be updated or
    # averaged here either.
    trained = model.vae if vae_only else model
    parameters = [p for p in trained.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    options = cfg.tokenizer_training if vae_only else cfg.ar_training
    averaged = copy.deepcopy(parameters) if options.ema_decay else None
    forward = torch.compile(model)

    def step() -> Any:
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
                torch._foreach_lerp_(averaged, parameters, 1 - options.ema_decay)
        return loss

    return step


# The attributes of the model that a part does not use. They are deleted before the measurement.
_UNUSED = {
    'prefill': ('vae', 'head'),
    'transformer': ('vae', 'head'),
    'head': ('layers', 'cls_embedding'),
    **dict.fromkeys(
        ('decode', 'encode', 'train_tokenizer'),
        ('layers', 'head', 'cls_embedding', 'pos_for_diff', 'proj_in'),
    ),
}


def _sampling_runs(
    torch: types.ModuleType, model: Any, cfg: ConfigDict, ar: AR, tensors: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """What one run of each part of sampling does, by the part's name.

    `ar` is our AR model, for the sizes, and `tensors` is what `_on_device` returns.
    """
    labels = tensors['labels']
    z = tensors['z']
    batch = len(z)
    class_tokens = ar.condition.length
    steps = cfg.sampling.num_steps
    scale = cfg.sampling.guidance_scale
    schedule = cfg.sampling.guidance

    def prefill() -> Any:
        null = torch.full_like(labels, _num_classes(ar))
        rows = torch.cat([labels, null])
        embedded = model.cls_embedding(rows).view(2 * batch, class_tokens, -1)
        return model.forward_model(embedded, 0, class_tokens)[:, -1]

    def transformer() -> Any:
        c = []
        for k in our_parts.positions(ar.num_tokens):
            start = class_tokens + k - 1
            last = model.proj_in(torch.cat([z[:, k - 1 : k]] * 2))
            c.append(model.forward_model(last, start, start + 1)[:, 0])
        return torch.stack(c, 1)

    def head(c: Any = tensors['condition']) -> Any:
        return model.head_sample(c[:, None], 1, steps, scale, schedule)[:, 0]

    return {
        'prefill': prefill,
        'transformer': transformer,
        'head': head,
        'decode': lambda: model.vae.decode(z).permute(0, 2, 3, 1),
        'encode': lambda: model.vae.encode(tensors['images'])[0],
        **dict.fromkeys(our_parts.STARTS, lambda: head(prefill())),
        'sample': lambda: model.sample(labels, steps, scale, schedule).permute(0, 2, 3, 1),
    }


def _on_device(
    torch: types.ModuleType, device: str, inputs: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The tensors of `our_parts.inputs`; images are (B, c, H, W) in channels-last memory."""
    images = torch.tensor(inputs['images'].transpose(0, 3, 1, 2)).to(device)
    return {
        'images': images.to(memory_format=torch.channels_last),
        'labels': torch.tensor(inputs['labels']).to(device).long(),
        'z': torch.tensor(inputs['z']).to(device),
        'condition': torch.tensor(inputs['condition']).to(device),
    }


def _peak_on_cpu() -> None:
    """Gives None for the peak memory of an accelerator, since there is none."""


def part(
    checkout: str,
    compiled: bool,
    cfg: ConfigDict,
    name: str,
    batch: int,
    weights: str | os.PathLike[str],
) -> tuple[Callable[[], np.ndarray], Callable[[], int | None]]:
    """One part of the benchmark on the public code.

    Args:
      checkout: directory of the public repository.
      compiled: whether its torch.compile is left on.
      cfg: a checked config, for sizes and settings.
      name: a key of `our_parts.PARTS`.
      batch: images.
      weights: a .npz file of {PyTorch name: array}.

    Returns:
      a function that runs the part once and returns an array, and a function that returns the peak
        memory of the accelerator in bytes (None on a CPU).

    Raises:
      ValueError: a weight is missing.
    """
    ar = build.build_ar(cfg)
    vae = build.build_vae(cfg)
    inputs = our_parts.inputs(ar, vae, batch)
    torch, public = _import(checkout, compiled)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    half = torch.autocast(device, torch.bfloat16, enabled=cfg.dtype == 'bfloat16')
    model = _build(torch, public, ar, vae)
    for attribute in _UNUSED.get(name, ()):
        delattr(model, attribute)
    _load(torch, model, weights)
    model = model.to(device, memory_format=torch.channels_last)
    model.diff_batch_mul = cfg.ar_training.copies
    tensors = _on_device(torch, device, inputs)
    training = name.startswith('train')
    if training:
        vae_only = name == 'train_tokenizer'
        step = _train(torch, model, cfg, vae_only, tensors['images'], tensors['labels'])
    else:
        model.eval()
        if name in ('prefill', 'transformer', 'sample', *our_parts.STARTS):
            model.enable_kv_cache(2 * batch)
        runs = _sampling_runs(torch, model, cfg, ar, tensors)
        step = runs[name]
        if name == 'transformer':
            with torch.no_grad(), half:
                runs['prefill']()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()

    def synchronised() -> np.ndarray:
        with half, torch.set_grad_enabled(training):
            out = step()[None] if training else step()
        return out.detach().float().cpu().numpy()  # This waits for the device.

    return synchronised, torch.cuda.max_memory_allocated if device == 'cuda' else _peak_on_cpu
