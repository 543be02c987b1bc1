"""nanoGPT's CPU recipe for character-level Shakespeare: 4 layers, width 128, 12 x 64 tokens.

Question: does the trainer reach the published validation loss of 1.88 nats (independent runs give
1.896 to 1.900 on the whole split)? A smoke test of the trainer, not a claim about models.
Command:  sparse-pretrain train --config=experiments/nanogpt_char.py --data=text_folder:FOLDER
          where FOLDER holds tinyshakespeare's input.txt; the last tenth is the validation split.
          ':muon' trains the same model with Muon at its own rate.
Measured: jax 0.12.0.1, two Zen 5 cores, seeds 0 to 2 (experiments/results/cpu_peers.json): 1.6626,
          1.6503, 1.6510 nats over the whole split after 2,000 steps, 63 s with the corpus, the
          compilation and 20 evaluations. nanoGPT's model in torch, same run: 1.8992, 1.9004,
          1.8996 after 61 s; ours is there after 23 to 27 s, at step 600 or 700.
Learned:  what is listed under Differs makes 0.24 nats, which part of it how much is untried. For
          scale: a 4-gram count model (Witten-Bell) scores 1.669 on this split.
Source:   karpathy/nanoGPT, config/train_shakespeare_char.py and the README's CPU flags: AdamW 1e-3
          to 1e-4 by cosine, 100 steps of warm-up, beta2 0.99, decay 0.1, clip 1, 2000 steps.
Differs:  rotary positions, RMSNorm and SwiGLU at the same parameter count (nanoGPT: learned
          positions, LayerNorm and GELU), an untied head, crops drawn by our own seed.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe with AdamW; `muon` for Muon."""
    if arg not in ("", "adamw", "muon"):
        raise ValueError(f"nanogpt_char: the argument is adamw or muon, got {arg!r}")
    if arg == "muon":
        optim = dict(kind="muon", lr=0.01, adam_lr=0.005, b2=0.99)
    else:
        optim = dict(kind="adamw", lr=1e-3, b2=0.99)
    attention = dict(kind="full", heads=4, qk_norm=False)
    return ConfigDict(
        dict(
            name="nanogpt_char",
            steps=2000,
            data=dict(
                source="text_folder:tinyshakespeare",
                tokenizer="char",
                pack="random_crop",
                seq=64,
                batch=12,
            ),
            model=dict(
                width=128,
                blocks=dict(block=dict(attention=attention, ffn=dict(kind="dense", hidden=344))),
                pattern=("block",),
                repeats=4,
                scan=False,
                dtype="float32",  # rows are short: bfloat16 buys nothing at this size
            ),
            optim=optim,
            schedule=dict(kind="cosine", warmup=0.05, final=0.1),
            sample=dict(prompt="ROMEO:", tokens=256),
        )
    )
