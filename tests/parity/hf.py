"""Builds and runs the peers of cases.py; needs torch and transformers, and nothing of ours."""

import numpy as np
import torch
import transformers

from tests.parity.cases import LENGTH, ROWS

# the smallest gap between a chosen and a rejected expert or group: a hundred times float32's error
MARGIN = 1e-4


def build(fields, seed):
    """A float64 model whose every weight and buffer is random: biases of both signs, norms not 1.

    Values are rounded to float16 so that a golden file holds them exactly in half the room.
    """
    config = transformers.DeepseekV3Config(
        **fields,
        attn_implementation="eager",
        experts_implementation="eager",  # grouped matmuls have no float64
        use_cache=False,
        attention_dropout=0.0,
    )
    model = transformers.DeepseekV3ForCausalLM(config).double()
    rng = np.random.default_rng(seed)
    for name, tensor in sorted(weights(model).items()):
        noise = rng.standard_normal(tensor.shape)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * noise
        elif name.endswith("e_score_correction_bias"):
            value = 0.3 * noise - 0.3
        elif "embed_tokens" in name:
            value = 0.5 * noise
        else:
            value = noise * tensor.shape[-1] ** -0.5
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(value.astype(np.float16).astype(np.float64)))
    return model.train()


def weights(model):
    """Name -> tensor of all that a checkpoint of the model holds, tied weights once."""
    held = dict(model.state_dict(keep_vars=True))
    if model.config.tie_word_embeddings:
        del held["lm_head.weight"]
    return held


def run(model, tokens):
    """Logits, mean loss and the gradient of every weight, as numpy; and the routing margin."""
    margins = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: margins.append(_margin(m, out)))
        for module in model.modules()
        if type(module).__name__ == "DeepseekV3TopkRouter"
    ]
    model.zero_grad(set_to_none=True)
    tokens = torch.from_numpy(tokens).long()
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    named = dict(model.named_parameters())
    return {
        "logits": logits.detach().numpy(),
        "loss": loss.item(),
        "grads": {k: named[k].grad.numpy() for k in weights(model) if k in named},
        "margin": min(margins, default=float("inf")),
    }


def _choice(router, logits):
    scores = logits.double().sigmoid() + router.e_score_correction_bias
    return scores, scores.view(len(scores), router.num_group, -1)


def _margin(router, out):
    """How far the closest rejected expert or group was from being chosen."""
    scores, grouped = _choice(router, out[0])
    best = grouped.topk(2, dim=-1)[0].sum(-1).sort(-1, descending=True)[0]
    kept = router.topk_group
    margin = float("inf")
    if kept < router.num_group:
        margin = (best[:, kept - 1] - best[:, kept]).min().item()
        scores = _masked(router, grouped, float("-inf"))
    ranked = scores.sort(-1, descending=True)[0]
    return min(margin, (ranked[:, router.top_k - 1] - ranked[:, router.top_k]).min().item())


def _masked(router, grouped, value):
    kept = grouped.topk(2, dim=-1)[0].sum(-1).topk(router.topk_group, dim=-1)[1]
    keep = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, kept, True)
    return grouped.masked_fill(~keep[..., None], value).flatten(1)


def mask_matters(model, tokens):
    """Share of tokens whose experts differ if dropped groups are masked with 0 instead of -inf.

    And whether this transformers masks them with 0, as 5.0 did: with biases that are all zero the
    two agree, since scores are positive.
    """
    shares, wrong = [], []

    def look(router, args, out):
        _, grouped = _choice(router, out[0])
        picks = [
            _masked(router, grouped, value).topk(router.top_k, dim=-1)[1].sort(-1)[0]
            for value in (float("-inf"), 0.0)
        ]
        shares.append((picks[0] != picks[1]).any(-1).double().mean().item())
        wrong.append(not torch.equal(out[2].sort(-1)[0], picks[0]))

    hooks = [
        module.register_forward_hook(look)
        for module in model.modules()
        if type(module).__name__ == "DeepseekV3TopkRouter"
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens).long()[:, :-1])
    for hook in hooks:
        hook.remove()
    return max(shares, default=0.0), any(wrong)


def draw(fields, seed):
    """(model, tokens) of the first seed from `seed` on whose routing has no near tie."""
    while True:
        model = build(fields, seed)
        tokens = np.random.default_rng(seed).integers(
            0, fields["vocab_size"], (ROWS, LENGTH), dtype=np.int32
        )
        if run(model, tokens)["margin"] > MARGIN:
            return model, tokens
        seed += 1
