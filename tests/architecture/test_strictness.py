"""The tests are as strict as CONTRIBUTING.md says: promotion, warnings, and every annotation."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from sparse_pretrain import nn
from sparse_pretrain.model import layers
from sparse_pretrain.optim import schedules

X, SCALE = jnp.ones((2, 3, 8)), jnp.ones((8,))


def test_promotion_of_dtypes_and_ranks_raises():
    with pytest.raises(ValueError, match="numpy_dtype_promotion=strict"):
        X + jnp.ones(8, jnp.int32)[None, None, :]
    with pytest.raises(ValueError, match="rank_promotion"):
        X + SCALE


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="anything"):
        warnings.warn("anything", stacklevel=1)


def test_a_true_call_passes():
    assert layers.rms_norm(X, SCALE, 1e-6).shape == X.shape
    assert schedules.Config(warmup=0).warmup == 0  # an int counts as a float


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "traced"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((4,), jnp.float32), ((1, 8), jnp.float32), ((8,), jnp.int32)]
)
def test_an_array_of_another_shape_or_dtype_raises(wrap, shape, dtype):
    with pytest.raises(TypeCheckError, match="parameter 'scale_D'"):
        wrap(lambda x, s: layers.rms_norm(x, s, 1e-6))(X, jnp.ones(shape, dtype))


def test_a_result_of_another_shape_raises(monkeypatch):
    monkeypatch.setattr(layers, "_rms_forward", lambda x, scale, eps: (x[0], ()))
    with pytest.raises(TypeCheckError, match=r"return value of .*rms_norm"):
        layers.rms_norm(X, SCALE, 1e-6)


def test_methods_and_configurations_are_checked():
    norm = layers.RMSNorm(8, nn.Keys(jax.random.key(0)))
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        norm(X.astype(jnp.int32))
    with pytest.raises(TypeCheckError, match="parameter kind=3"):
        schedules.Config(kind=3)
