"""Named workloads of cross-entropy, shared by tests, tuner, bench and compile."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One workload: sizes, options and dtypes."""

    T: int = 96
    D: int = 32
    V: int = 80
    z_loss: float = 0.0
    softcap: float | None = None
    chunk: int | None = None
    head_layout: str = "DV"
    padding: bool = False  # a quarter of the tokens has weight 0, others fractions
    std: float = 1.0  # of the logits, about
    dtype: str = "float32"
    head_dtype: str | None = None  # dtype when None

    def arguments(self, *, seed: int = 0, dtype=None):
        """Return the arguments and keywords of one call."""
        rng = np.random.default_rng(seed + 2)
        dtype = jnp.dtype(dtype or self.dtype)
        head_dtype = dtype if dtype == jnp.float64 else jnp.dtype(self.head_dtype or dtype)
        x = numerics.normal((self.T, self.D), dtype, seed=seed)
        shape = (self.D, self.V) if self.head_layout == "DV" else (self.V, self.D)
        head = numerics.normal(shape, head_dtype, seed=seed + 1, std=self.std * self.D**-0.5)
        targets = jnp.asarray(rng.integers(0, self.V, self.T), jnp.int32)
        weights = np.ones(self.T, np.float32)
        if self.padding:
            weights = rng.uniform(0, 2, self.T).astype(np.float32)
            weights[rng.uniform(size=self.T) < 0.25] = 0
        keywords = {"z_loss": self.z_loss, "softcap": self.softcap, "chunk": self.chunk,
                    "head_layout": self.head_layout}
        return (x, head, targets, jnp.asarray(weights)), keywords


PARITY = {
    "plain": Spec(),
    "one_token": Spec(T=1),
    "chunks": Spec(T=256, chunk=64),
    "odd": Spec(T=203, D=24, V=77, chunk=50),
    "tied": Spec(T=150, chunk=64, head_layout="VD"),
    "padding": Spec(T=130, chunk=64, padding=True),
    "z_loss": Spec(T=130, chunk=64, z_loss=0.01, padding=True),
    "softcap": Spec(T=130, chunk=64, softcap=3.0, std=3.0),
    "confident": Spec(T=130, std=20.0),
    "all": Spec(T=201, D=40, V=99, chunk=70, softcap=5.0, z_loss=0.02, padding=True,
                head_layout="VD", head_dtype="float32", std=3.0),
}

SPEED = {
    "quickstart": Spec(T=8192, D=256, V=4096, dtype="bfloat16", head_dtype="float32"),
    "tied": Spec(T=8192, D=256, V=4096, dtype="bfloat16", head_dtype="float32", head_layout="VD"),
    "gpt2": Spec(T=2048, D=768, V=50304, dtype="bfloat16", head_dtype="float32"),
}

# For tensor cores: Gemma 2's head, on which Cut Cross-Entropy (2411.09009, table 1) holds 1.2 GB
# with its gradients where the baseline holds 28; DeepSeek-V3's, with 28 GB of logits in float32.
HOPPER = {
    "gemma2_2b": Spec(T=8192, D=2304, V=256000, dtype="bfloat16", softcap=30.0, head_layout="VD"),
    "deepseek_v3": Spec(T=54272, D=7168, V=129280, dtype="bfloat16"),
}
