"""Every margin's loss as one dense fp64 expression; it shares no code with the package.

The equations are written from the papers, with what the documentation adds to them: the curve past
pi, and where a moving average stands at its first step.
"""

import math

import torch
import torch.nn.functional as F


def exact_product(left, right):
    return left @ right.T


def bf16_product(left, right):
    """As autocast has it: operands and result in bf16."""
    return (left.bfloat16() @ right.bfloat16().T).float()


def loss_of(
    margin,
    embeddings,
    centers,
    identities,
    *,
    sampled=None,
    state=None,
    noise=None,
    product=exact_product,
    left_out=None,
    log_weight=None,
):
    """Mean loss of a batch over the sampled identities.

    Args:
        margin: Of the package; its class name chooses the equation, its fields the numbers.
        embeddings: fp64 [B, D].
        centers: fp64 [C * K, D], or [C, D + 1] with a bias.
        identities: int64 [B].
        sampled: int64 sorted identities; ``None`` for all.
        state: Moving averages before the step.
        noise: [B] standard normal numbers of ElasticFace.
        product: Of embeddings and centers.
        left_out: bool [B, n], the sampled identities that a row is not told from; ``None``: none.
        log_weight: [n], log of how many identities each sampled one stands for; ``None``: one.
    """
    name = type(margin).__name__
    per_identity = getattr(margin, "sub_centers", 1)
    if sampled is None:
        sampled = torch.arange(len(centers) // per_identity)
    own = F.one_hot(torch.searchsorted(sampled, identities), len(sampled)).bool()
    norm = embeddings.norm(dim=1)
    logits = logits_of(margin, embeddings, centers, own, sampled, state, noise, product)
    if left_out is not None:
        logits = logits.masked_fill(left_out, -1e9)
    if name == "UniFace":
        bias = state["bias"]
        each = torch.where(own, F.softplus(bias - logits), F.softplus(logits - bias))
        each = each if log_weight is None else each * log_weight.double().exp()
        return each.sum(1).mean()
    target = own.to(logits.dtype)
    target = (1 - margin.label_smoothing) * target + margin.label_smoothing / len(sampled)
    weight = torch.zeros_like(target) if log_weight is None else log_weight.double()
    weighted = logits + weight
    # 1 + a sum of 1e-17 would be 1, and so would the gradient by the positive.
    others = weighted.masked_fill(own, -torch.inf).logsumexp(1)
    loss = F.softplus(others - (own * weighted).sum(1))
    loss = loss + ((own.to(target) - target) * logits + own * weight).sum(1)
    if name == "MagFace":
        bounded = norm.clamp(margin.smallest_norm, margin.largest_norm)
        loss = loss + margin.norm_weight * (bounded / margin.largest_norm**2 + 1 / bounded)
    return loss.mean()


def logits_of(margin, embeddings, centers, own, sampled, state, noise, product=exact_product):
    """The logits [B, n] of the sampled identities, with the margin where ``own`` is true."""
    name, norm = type(margin).__name__, embeddings.norm(dim=1)
    per_identity = getattr(margin, "sub_centers", 1)
    if name == "Softmax":
        return product(embeddings, centers[sampled, :-1]) + centers[sampled, -1]
    if name == "LSoftmax":
        weight = centers[sampled]
        cosine = product(F.normalize(embeddings), F.normalize(weight))
        logits = cosine * norm[:, None] * weight.norm(dim=1)
        folded = annealed(margin, cosine) * norm[:, None] * weight.norm(dim=1)
        return torch.where(own, folded, logits)
    rows = (sampled[:, None] * per_identity + torch.arange(per_identity)).flatten()
    cosine = product(F.normalize(embeddings), F.normalize(centers[rows]))
    cosine = cosine.view(len(cosine), len(sampled), per_identity).amax(2)
    return cosine_logits(margin, name, cosine, norm, own, state, noise)


def cosine_logits(margin, name, cosine, norm, own, state, noise):
    """The logits of margins whose class centers have unit length."""
    positive = (cosine * own).sum(1)
    if name in ("ModifiedSoftmax", "SphereFace"):
        scale = norm[:, None]
    else:
        scale = state["scale"] if name == "AdaCos" else margin.scale
    negative = cosine
    if margin.inter_class_filter is not None:
        negative = torch.where(cosine > margin.inter_class_filter, 0.0, cosine)
    if name in ("ModifiedSoftmax", "NormalizedSoftmax", "AdaCos"):
        shifted = positive
    elif name in ("ArcFace", "SubCenterArcFace"):
        shifted = arc(positive, margin.angular)
    elif name in ("CosFace", "UniFace"):
        shifted = positive - margin.additive
    elif name == "CombinedMargin":
        shifted = combined(margin, positive)
    elif name in ("SphereFace", "FNormSphereFace"):
        shifted = annealed(margin, positive)
    elif name == "AdaFace":
        shifted = adaface(margin, positive, norm.detach(), state)
    elif name == "MagFace":
        bounded = norm.clamp(margin.smallest_norm, margin.largest_norm)
        share = (bounded - margin.smallest_norm) / (margin.largest_norm - margin.smallest_norm)
        rise = margin.largest_angular - margin.smallest_angular
        shifted = arc(positive, margin.smallest_angular + share * rise)
    elif name == "ElasticFace":
        drawn = margin.margin + margin.deviation * noise.clamp(-1, 1).to(positive.dtype)
        if margin.sort:
            rank = positive.detach().argsort(descending=True).argsort()
            drawn = drawn.sort().values[rank]
        shifted = arc(positive, drawn) if margin.base == "arcface" else positive - drawn
    elif name == "CurricularFace":
        shifted = arc(positive, margin.angular)
        share = margin.averaging
        t = (1 - share) * state["t"] + share * positive.detach().mean()
        hard = cosine > (positive.clamp(-1, 1).acos() + margin.angular).cos().detach()[:, None]
        negative = torch.where(hard, cosine * (t + cosine), cosine)
    elif name == "MVSoftmax":
        shifted = positive - margin.margin
        if margin.base == "arcface":
            shifted = arc(positive, margin.margin)
        hard = cosine > shifted.detach()[:, None]
        linear = margin.weight if margin.weighting == "adaptive" else 1.0
        negative = torch.where(hard, linear * cosine + margin.weight - 1, cosine)
    else:
        raise AssertionError(f"no equation for {name}")
    if getattr(margin, "gradient", "exact") == "straight_through":
        shifted = positive + (shifted - positive).detach()
    return torch.where(own, shifted[:, None], negative) * scale


def arc(cosine, margin):
    """cos(theta + m), and beyond pi - m the cosine less what makes it continuous."""
    margin = torch.as_tensor(margin, dtype=cosine.dtype).expand_as(cosine)
    inside = cosine > -margin.cos()
    theta = torch.where(inside, cosine, 0.0).clamp(-1, 1).acos()
    return torch.where(inside, (theta + margin).cos(), cosine - 1 + margin.cos())


def combined(margin, cosine):
    """cos(m0 theta + m1) - m2; past pi only the ways that the tests use."""
    theta = cosine.clamp(-1, 1).acos()
    phi = margin.multiplicative * theta + margin.angular
    if margin.past_pi == "fold":
        k = (phi.detach() / math.pi).floor()
        return (-1) ** k * phi.cos() - 2 * k - margin.additive
    turn = math.cos(min(math.pi, (math.pi - margin.angular) / margin.multiplicative))
    beyond = {
        "linear": cosine - (1 + turn),
        "drop": cosine - margin.angular * math.sin(margin.angular),
    }[margin.past_pi]
    return torch.where(phi < math.pi, phi.cos(), beyond) - margin.additive


def annealed(margin, cosine):
    """(weight cos + psi) / (1 + weight) at the first step."""
    theta = cosine.clamp(-1, 1).acos()
    k = (margin.multiplicative * theta.detach() / math.pi).floor()
    k = k.clamp(max=margin.multiplicative - 1)
    folded = (-1) ** k * (margin.multiplicative * theta).cos() - 2 * k
    weight = max(margin.annealing, margin.annealing_end)
    return (weight * cosine + folded) / (1 + weight)


def adaface(margin, cosine, norm, state):
    """Eq. 13 with mean and deviation after the first batch."""
    norm, share = norm.clamp(1e-3, 100), margin.averaging
    mean = (1 - share) * state["norm_mean"] + share * norm.mean()
    deviation = (1 - share) * state["norm_std"] + share * norm.std()
    quality = (margin.concentration * (norm - mean) / (deviation + 1e-3)).clamp(-1, 1)
    theta = (cosine.clamp(-1, 1).acos() - margin.margin * quality).clamp(1e-3, math.pi - 1e-3)
    return theta.cos() - margin.margin * (1 + quality)


def gradients_of(margin, embeddings, centers, identities, *, dtype=torch.float64, **settings):
    """Loss and its gradients by embeddings and centers."""
    embeddings = embeddings.detach().to(dtype).requires_grad_()
    centers = centers.detach().to(dtype).requires_grad_()
    loss = loss_of(margin, embeddings, centers, identities, **settings)
    loss.backward()
    return loss.detach(), embeddings.grad, centers.grad
