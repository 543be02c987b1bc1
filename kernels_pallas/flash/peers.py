"""Attention by others' kernels, where they are installed: cuDNN on a GPU, splash on a TPU, Tokamax.

They are peers to measure against and run only where they are asked for by name.
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import device, others

_BLOCKS = (512, 256, 128)  # splash's tiles are whole, and wider than a lane is


# What each takes beside q, k and v; anything else that is asked for is refused.
_UNASKED = {"return_lse": False, "stride": 1, "span": 1}  # None for all others
_CUDNN = ("scale", "causal", "window", "block_q", "block_k")
_TOKAMAX = (*_CUDNN, "softcap")
_SPLASH = (*_CUDNN, "softcap", "sinks_H", "segments_q", "segments_k", "return_lse")


def _more(name, known, keywords) -> str | None:
    """The first thing asked for that it does not have."""
    for what, asked in keywords.items():
        unasked = asked == _UNASKED[what] if what in _UNASKED else asked is None
        if what not in known and not unasked:
            return f"{name} has no {what}"
    return None


def cudnn_supports(q, k, v, **keywords) -> str | None:
    """Return None, or why cuDNN cannot run this call."""
    target, Dk, Dv, L, S = device.target(), q.shape[-1], v.shape[-1], q.shape[1], k.shape[1]
    causal, window = keywords.get("causal", True), keywords.get("window")
    if target.platform != "gpu" or target.capability is None:
        return f"needs an NVIDIA GPU, the device is {target.kind or target.platform}"
    if not _has_cudnn():
        return "cuDNN is not installed"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs bfloat16 or float16, q is {q.dtype}"
    if Dk != Dv or Dk % 8 or Dk > 128:
        return f"cuDNN needs equal widths, a multiple of 8 up to 128; Dk is {Dk} and Dv {Dv}"
    if causal and L != S:
        return f"cuDNN's mask begins at the first key: needs L = S, got {L} and {S}"
    if window is not None and not causal:
        return "cuDNN's window is causal"
    return _more("cuDNN", _CUDNN, keywords)


def _has_cudnn() -> bool:
    try:
        if importlib.util.find_spec("nvidia.cudnn") is not None:
            return True
    except ModuleNotFoundError:
        pass
    return ctypes.util.find_library("cudnn") is not None


def cudnn(q, k, v, *, scale, causal=True, window=None, implementation="cudnn", **nothing):
    """Attend by `jax.nn.dot_product_attention`."""
    del nothing
    size = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal,
                                        local_window_size=size, implementation=implementation)


def splash_supports(q, k, v, **keywords) -> str | None:
    """Return None, or why splash attention cannot run this call."""
    del v
    L, S = q.shape[1], k.shape[1]
    if lacks := device.lacks_tpu():
        return lacks
    if L % 128 or S % 128 or 0 in (L, S):
        return f"splash needs lengths in multiples of 128, got {L} and {S}"
    if L > S and keywords.get("causal", True):
        return f"splash leaves rows that see nothing undefined: L is {L} and S {S}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash needs bfloat16 or float32, q is {q.dtype}"
    if keywords.get("return_lse") and device.jax_version() < (0, 12):
        # the oldest whose backward kernels were tried by themselves
        return f"splash's log-sum-exp needs jax 0.12, this is {jax.__version__}"
    return _more("splash", _SPLASH, keywords)


def splash(q_BxLxHxDk, k_BxSxKxDk, v_BxSxKxDv, *, segments_q=None, segments_k=None, scale,
           causal=True, window=None, softcap=None, sinks_H=None, return_lse=False, **nothing):
    """Attend by JAX's splash attention: one multi-query kernel for each key head."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del nothing
    (B, L, H, _), (S, K) = q_BxLxHxDk.shape, k_BxSxKxDk.shape[1:3]
    if window is not None:
        mask = masks.LocalMask((L, S), (window - 1, 0 if causal else None), S - L)
    else:
        mask = masks.CausalMask((L, S), S - L) if causal else masks.FullMask((L, S))
    m, n = (next(b for b in _BLOCKS if length % b == 0) for length in (L, S))
    sizes = kernels.BlockSizes(block_q=m, block_kv=n, block_q_dkv=m, block_kv_dkv=n,
                               block_q_dq=m, block_kv_dq=n)
    attend = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (H // K)), block_sizes=sizes, attn_logits_soft_cap=softcap,
        save_residuals=return_lse, interpret=device.target().interpret is not None)
    if return_lse:
        attend = functools.partial(_with_lse(kernels), attend)
    q = (q_BxLxHxDk.astype(jnp.float32) * np.float32(scale)).astype(q_BxLxHxDk.dtype)
    q = q.reshape(B, L, K, H // K, -1).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BxSxKxDk, v_BxSxKxDv))
    ids = None
    if segments_q is not None:
        # padding, of segment 0, equals nothing and is seen by nothing
        own = jnp.where(segments_q == 0, jnp.full_like(segments_q, -1), segments_q)
        theirs = jnp.where(segments_k == 0, jnp.full_like(segments_k, -2), segments_k)
        ids = kernels.SegmentIds(own, theirs)
    sinks = None if sinks_H is None else sinks_H.reshape(K, H // K)
    of_heads = jax.vmap(attend, in_axes=(0, 0, 0, None, None if sinks is None else 0))
    found = jax.vmap(of_heads, in_axes=(0, 0, 0, None if ids is None else 0, None))(
        q, k, v, ids, sinks)
    o, lse = found if return_lse else (found, None)
    padding = None if segments_q is None else (segments_q == 0)[:, None, None]
    if padding is not None:
        o = jnp.where(padding[..., None], jnp.zeros_like(o), o)
    o = o.transpose(0, 3, 1, 2, 4).reshape(B, L, H, -1)
    if not return_lse:
        return o
    if padding is not None:
        nothing = np.float32(-1e30) if sinks is None else sinks.astype(lse.dtype)[None, ..., None]
        lse = jnp.where(padding, jnp.broadcast_to(nothing, lse.shape), lse)
    return o, lse.transpose(0, 3, 1, 2).reshape(B, L, H)


def _with_lse(kernels):
    """Return attend(kernel, q, k, v, ids, sinks), which gives o and the log-sum-exp, both with
    gradients, of a kernel that saves it.

    Splash itself has no gradient then. Its backward kernels take, of every row, the sum of o times
    its gradient, and the log-sum-exp's gradient is one more number to take off it.
    """
    def forward(kernel, *arrays):
        o, (lse,) = kernel(*arrays)
        return (o, lse), (kernel, arrays, o, lse)

    def backward(kept, cotangents):
        (kernel, arrays, o, lse), (do, d_lse) = kept, cotangents
        sizes, sinks = kernel.kwargs["block_sizes"], arrays[4]
        names = ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function", "interpret")
        known = {name: kernel.kwargs[name] for name in names} | {
            f"{x}_layout": getattr(sizes, f"{x}_layout") for x in "qkv"}
        delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1) - d_lse
        _, dk, dv = kernels._splash_attention_bwd_dkv(
            *arrays, lse, do, delta, bq=sizes.block_q_dkv, bkv=sizes.block_kv_dkv,
            bkv_compute=sizes.block_kv_dkv_compute, mask_info=kernel.dkv_mask_info,
            use_fused_bwd_kernel=False, **known)
        dq = kernels._splash_attention_bwd_dq(
            *arrays, lse, do, delta, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq,
            mask_info=kernel.dq_mask_info, **known)
        d_sinks = None
        if sinks is not None:
            of_sinks = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse)
            d_sinks = -(of_sinks * delta).sum(-1).astype(sinks.dtype)
        return None, dq, dk, dv, None, d_sinks

    attend = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    attend.defvjp(forward, backward)
    return attend


def tokamax_supports(q, k, v, **keywords) -> str | None:
    """Return None, or why Tokamax cannot run this call."""
    if lacks := others.lacks_tokamax(q=q, k=k, v=v):
        return lacks
    L, S = q.shape[1], k.shape[1]
    if keywords.get("causal", True) and L != S:
        return f"Tokamax's mask begins at the first key: needs L = S, got {L} and {S}"
    return _more("Tokamax", _TOKAMAX, keywords)


def tokamax(q, k, v, *, scale, causal=True, window=None, softcap=None, implementation=None,
            **nothing):
    """Attend by `tokamax.dot_product_attention`."""
    import tokamax as peer

    del nothing
    size = None if window is None else (window - 1, 0 if causal else window - 1)
    return peer.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=size, logits_soft_cap=softcap,
        implementation=implementation or others.mosaic())
