"""The torch side of the CPU comparison: a worker that trains a Hugging Face model or nanoGPT's.

Run by cpu_peers.py, with an interpreter that has torch and transformers; speaks JSON over its pipe.
"""

import math
import sys
import time

import peers_common as common

common.use_threads(int(sys.argv[1]))  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(int(sys.argv[1]))


def hugging_face(model):
    """The model of `peers_common`, at random init."""
    import transformers

    transformers.logging.set_verbosity_error()
    shared = {
        "vocab_size": common.VOCAB,
        "hidden_size": common.WIDTH,
        "num_hidden_layers": common.LAYERS,
        "num_attention_heads": common.HEADS,
        "num_key_value_heads": common.HEADS,
        "max_position_embeddings": common.SEQ,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    if model == "dense":
        config = transformers.LlamaConfig(**shared, **common.DENSE)
        return transformers.LlamaForCausalLM(config)
    config = transformers.DeepseekV3Config(
        **shared,
        **common.MOE,
        intermediate_size=common.DENSE["intermediate_size"],
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        experts_implementation="grouped_mm",
    )
    return transformers.DeepseekV3ForCausalLM(config)


def build_throughput(request):
    """Training steps of one model in one precision: 'fp32', 'autocast' (float32 masters) or
    'bf16' (everything)."""
    import transformers

    torch.manual_seed(0)
    model = hugging_face(request["model"])
    precision = request["precision"]
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **common.ADAMW)
    rows = torch.from_numpy(common.tokens())
    done = 0

    def step():
        nonlocal done
        row = rows[done % len(rows)]
        done += 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            # the logits and the mean loss exactly as ours: SEQ inputs, SEQ targets
            logits = model(input_ids=row[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), row[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def run(steps):
        for _ in range(steps):
            loss = step()
        return loss.item()

    first = common.timed(lambda: run(1))
    reply = {
        "params": sum(p.numel() for p in model.parameters()),
        "first_step_seconds": first["seconds"],
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return reply, lambda request: common.timed(lambda: run(request["steps"]))


class Block(torch.nn.Module):
    """GPT-2's block as nanoGPT writes it, no bias."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1 = torch.nn.LayerNorm(width, bias=False)
        self.c_attn = torch.nn.Linear(width, 3 * width, bias=False)
        self.attn_c_proj = torch.nn.Linear(width, width, bias=False)
        self.ln_2 = torch.nn.LayerNorm(width, bias=False)
        self.c_fc = torch.nn.Linear(width, 4 * width, bias=False)
        self.mlp_c_proj = torch.nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = (
            t.view(rows, length, self.heads, width // self.heads).transpose(1, 2)
            for t in self.c_attn(self.ln_1(x)).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_c_proj(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp_c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(torch.nn.Module):
    """nanoGPT's model: learned positions, tied head, GPT-2's initialisation."""

    def __init__(self, vocab, block, layers, heads, width):
        super().__init__()
        self.wte = torch.nn.Embedding(vocab, width)
        self.wpe = torch.nn.Embedding(block, width)
        self.h = torch.nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = torch.nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = 2 * layers if "c_proj" in name else 1
                torch.nn.init.normal_(p, std=0.02 / math.sqrt(residual))

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def whole_split(model, data, block):
    """Mean nats per character over every full block of `data`, each on its own."""
    count = (len(data) - 1) // block
    tokens = data[: count * block].view(count, block)
    targets = data[1 : count * block + 1].view(count, block)
    total = sum(
        model(tokens[i : i + 128], targets[i : i + 128]).item() * len(tokens[i : i + 128])
        for i in range(0, count, 128)
    )
    return total / count


def build_shakespeare(request):
    """nanoGPT's CPU recipe (config/train_shakespeare_char.py with the README's CPU arguments)."""
    recipe = request["recipe"]
    torch.manual_seed(request["seed"])
    text = open(request["path"], encoding="utf-8").read()
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([symbols[c] for c in text])
    cut = int(0.9 * len(data))
    train, heldout = data[:cut], data[cut:]
    block, batch, steps = recipe["block"], recipe["batch"], recipe["steps"]
    started = time.perf_counter()
    model = NanoGPT(len(symbols), block, recipe["layers"], recipe["heads"], recipe["width"])
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe["lr"],
        betas=(0.9, recipe["beta2"]),
        fused=True,
    )

    def rate(step):
        if step < recipe["warmup"]:
            return recipe["lr"] * (step + 1) / (recipe["warmup"] + 1)
        part = (step - recipe["warmup"]) / (steps - recipe["warmup"])
        low = recipe["final_lr"]
        return low + 0.5 * (1 + math.cos(math.pi * part)) * (recipe["lr"] - low)

    offsets = np.arange(block)
    rng = np.random.default_rng(request["seed"])
    done = 0

    def run(count):
        nonlocal done
        for _ in range(count):
            for group in optimizer.param_groups:
                group["lr"] = rate(done)
            rows = rng.integers(0, len(train) - block, (batch, 1)) + offsets
            loss = model(train[rows], train[rows + 1])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
        return loss.item()

    reply = {
        "params": sum(p.numel() for p in model.parameters()),
        "setup_seconds": time.perf_counter() - started,
        "vocab": len(symbols),
        "train_characters": cut,
        "heldout_characters": len(heldout),
        "versions": {"torch": torch.__version__},
    }

    def handle(request):
        if request.get("evaluate"):
            return common.timed(lambda: whole_split(model, heldout, block))
        return common.timed(lambda: run(request["steps"]))

    return reply, handle


def build(request):
    return {"throughput": build_throughput, "shakespeare": build_shakespeare}[request["part"]](
        request
    )


if __name__ == "__main__":
    common.serve(build)
