"""Routers: one file each, one row here."""

from sparse_pretrain.routing.sigmoid_bias import SigmoidBias

TABLE = {
    "sigmoid_bias": SigmoidBias,
}
