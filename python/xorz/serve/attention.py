"""`F.multi_head_attention_forward` where the packed or separate input projections, or the output one, are a tenant's.

The steps after the projections are those of torch 2.15's own function, in its order, so that exact products give its bits.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .weight import Weight, plain

F = nn.functional


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Arguments and results of torch's function; query, key and value are [length, batch, width] or [length, width]."""
    if static_k is not None or static_v is not None:
        return NotImplemented
    projections = (in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, bias_k, bias_v)
    if not _is_one(projections, "attention") or not _is_one((out_proj_weight, out_proj_bias), "linear"):
        return NotImplemented
    batched = query.dim() == 3
    if not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    if is_causal and attn_mask is None:
        raise RuntimeError("xorz: is_causal needs attn_mask, as in torch")
    attn_mask = _float(attn_mask, query.dtype)
    # As torch does: drop a causal mask where the `is_causal` hint is enough, and the hint where the mask is needed.
    hint = is_causal and key_padding_mask is None
    if hint and not need_weights:
        attn_mask = None
    key_padding_mask = _float(key_padding_mask, query.dtype)
    attn_mask = _shaped(attn_mask, batch * num_heads, length, key.size(0))
    if use_separate_proj_weight:
        biases = (None, None, None) if in_proj_bias is None else (in_proj_bias, in_proj_bias, in_proj_bias)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (
            _project(x, w, b, i)
            for i, (x, w, b) in enumerate(zip((query, key, value), weights, biases, strict=True))
        )
    else:
        q, k, v = _packed(query, key, value, in_proj_weight, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, _plain(bias_k, batch)]), torch.cat([v, _plain(bias_v, batch)])
        attn_mask, key_padding_mask = (
            None if m is None else F.pad(m, (0, 1)) for m in (attn_mask, key_padding_mask)
        )
    head = width // num_heads
    q = q.reshape(length, batch * num_heads, head).transpose(0, 1)
    k, v = (t.reshape(t.size(0), batch * num_heads, head).transpose(0, 1) for t in (k, v))
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(batch * num_heads, 1, head)], dim=1) for t in (k, v))
        attn_mask, key_padding_mask = (
            None if m is None else F.pad(m, (0, 1)) for m in (attn_mask, key_padding_mask)
        )
    if key_padding_mask is not None:
        mask = key_padding_mask.view(batch, 1, 1, k.size(1)).expand(-1, num_heads, -1, -1)
        mask = mask.reshape(batch * num_heads, 1, k.size(1))
        attn_mask = mask if attn_mask is None else attn_mask + mask
    drop = dropout_p if training else 0.0
    mixed, shares = _attend(
        q, k, v, attn_mask, drop, need_weights, hint and attn_mask is None, batch, num_heads
    )
    out = _out(mixed.reshape(length * batch, width), out_proj_weight, out_proj_bias, length, batch)
    if shares is not None:
        shares = shares.view(batch, num_heads, length, k.size(1))
        shares = shares.mean(dim=1) if average_attn_weights else shares
    if not batched:
        out, shares = out.squeeze(1), None if shares is None else shares.squeeze(0)
    return out, shares


def _float(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _shaped(mask: Tensor | None, heads: int, length: int, source: int) -> Tensor | None:
    if mask is None:
        return None
    want = (length, source) if mask.dim() == 2 else (heads, length, source)
    if tuple(mask.shape) != want:
        raise RuntimeError(f"xorz: attn_mask is {list(mask.shape)}, but must be {list(want)}")
    return mask.unsqueeze(0) if mask.dim() == 2 else mask


_NAMES = {
    "attention": (
        "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    ),
    "linear": ("weight", "bias"),
}  # fmt: skip


def _is_one(tensors: tuple[Any, ...], kind: str) -> bool:
    """Whether these are the tensors of one module of that kind, each in its own place, or none is a tenant's. Others call
    torch's function with tensors of several modules (WavLM), or joined ones: those are not to be taken for a module's own.
    """
    changed = [t for t in tensors if isinstance(t, Weight) and t.changed()]
    if not changed:
        return True
    site = changed[0].places[0][0]
    if site.kind != kind:
        return False
    own = [(t, name) for t, name in zip(tensors, _NAMES[kind], strict=True) if t is not None]
    # If the module has a bias that the caller leaves out, it would be added all the same.
    has_bias = tensors[_NAMES[kind].index("in_proj_bias" if kind == "attention" else "bias")] is not None
    wants = has_bias == (("in_proj_bias" if kind == "attention" else "bias") in site.base)
    return wants and all(isinstance(t, Weight) and t.matrix == (site, name, False) for t, name in own)


def _site(weight: Any) -> Any:
    """(site, its name of the tensor) if it is a tenant's."""
    return weight.places[0] if isinstance(weight, Weight) and weight.changed() else None


def _project(x: Tensor, weight: Any, bias: Any, part: int | None) -> Tensor:
    """x @ W^T + b where either may be a tenant's; `part` takes a third of the bias."""
    found = _site(weight)
    if found is None:
        weight, bias = plain(weight), plain(bias)
        thirds = bias if bias is None or part is None else bias.chunk(3)[part]
        return F.linear(x, weight, thirds)
    # Either all parameters of a module are taken for a tenant's, or none.
    site, param = found
    rows = weight.rows()
    table = None if bias is None else site.biases("in_proj_bias")
    if table is not None and part is not None:
        table = table.chunk(3, dim=1)[part]
    slots = rows.along(1).rows(x.shape[:-1], False, site.name)
    return site.product(x, site.base[param], table, param, slots, rows.only)


def _packed(query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Any) -> list[Tensor]:
    if _site(weight) is None:
        return F._in_projection_packed(query, key, value, plain(weight), plain(bias))
    width = query.size(-1)
    whole = _project(query, weight, bias, None)
    if key is value and query is key:
        return [t.contiguous() for t in whole.split(width, dim=-1)]
    both = _project(key, weight, bias, None)
    last = both if key is value else _project(value, weight, bias, None)
    return [whole[..., :width], both[..., width : 2 * width], last[..., 2 * width :]]


def _plain(bias: Any, batch: int) -> Tensor:
    found = _site(bias)
    if found is None:
        return plain(bias).repeat(1, batch, 1)
    site, param = found
    slots = bias.rows().along(1).rows((1, batch), False, site.name)
    return torch.cat([site.value(param, slot, site.base[param]) for slot in slots.tolist()], dim=1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop: float,
    need_weights: bool,
    is_causal: bool,
    batch: int,
    heads: int,
) -> tuple[Tensor, Tensor | None]:
    """[length, batch, heads * head] mixed values, and the shares of attention if they are wanted."""
    length, head = q.size(1), q.size(2)
    if need_weights:
        q = q * math.sqrt(1.0 / float(head))
        scores = (
            torch.bmm(q, k.transpose(-2, -1)) if mask is None else torch.baddbmm(mask, q, k.transpose(-2, -1))
        )
        shares = F.softmax(scores, dim=-1)
        shares = F.dropout(shares, p=drop) if drop > 0.0 else shares
        return torch.bmm(shares, v).transpose(0, 1), shares
    if mask is not None:
        whole = mask.size(0) == 1 and mask.dim() == 3
        mask = mask.unsqueeze(0) if whole else mask.view(batch, heads, -1, k.size(1))
    q = q.view(batch, heads, length, head)
    k, v = (t.view(batch, heads, t.size(1), head) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal)
    return out.permute(2, 0, 1, 3).contiguous(), None


def _out(mixed: Tensor, weight: Any, bias: Any, length: int, batch: int) -> Tensor:
    found = _site(weight) or _site(bias)
    if found is None:
        return F.linear(mixed, plain(weight), plain(bias)).view(length, batch, -1)
    site, _param = found
    rows = site.owner.now(site.device)
    slots = rows.along(1).rows((length, batch), False, site.name)
    table = site.biases("bias")
    out = site.product(mixed, site.base["weight"], table, "weight", slots, rows.only)
    return out.view(length, batch, -1)
