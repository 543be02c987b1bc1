"""Writes golden/*.npz: inputs, weights, logits, loss and gradients of tiny Hugging Face models.

Run with an interpreter that has torch and transformers: python -m tests.parity.make_golden
Computed in float64 (Hugging Face keeps its norms and its router in float32), stored as float32;
weights are float16 numbers, stored as such without loss.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.parity import hf
from tests.parity.cases import CASES


def main():
    folder = Path(__file__).parent / "golden"
    folder.mkdir(exist_ok=True)
    for name, fields in CASES.items():
        model, tokens = hf.draw(fields, seed=0)
        result = hf.run(model, tokens)
        share, wrong = hf.mask_matters(model, tokens)
        assert not wrong, f"transformers {transformers.__version__} masks dropped groups with 0"
        if fields["topk_group"] < fields["n_group"]:
            assert share > 0.1, "the biases are too mild to tell a mask of 0 from one of -inf"
        about = {
            "config": fields,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "margin": None if result["margin"] == float("inf") else result["margin"],
            "mask_matters": share,
        }
        arrays = {
            "about": np.array(json.dumps(about)),
            "tokens": tokens,
            "logits": result["logits"].astype(np.float32),
            "loss": np.float64(result["loss"]),
        }
        for key, tensor in hf.weights(model).items():
            arrays[f"weight/{key}"] = tensor.detach().numpy().astype(np.float16)
        for key, grad in result["grads"].items():
            arrays[f"grad/{key}"] = grad.astype(np.float32)
        path = folder / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(
            f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, loss {result['loss']:.4f}, "
            f"margin {result['margin']:.1e}, mask matters for {share:.0%} of tokens"
        )


if __name__ == "__main__":
    main()
