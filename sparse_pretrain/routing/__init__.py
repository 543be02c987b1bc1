"""Routers: one file each, one row here."""

from sparse_pretrain.routing.expert_choice import ExpertChoice
from sparse_pretrain.routing.hash import Hash
from sparse_pretrain.routing.market import Market
from sparse_pretrain.routing.sigmoid_bias import SigmoidBias
from sparse_pretrain.routing.topk import TopK

TABLE = {
    "sigmoid_bias": SigmoidBias,
    "topk": TopK,
    "market": Market,
    "expert_choice": ExpertChoice,
    "hash": Hash,
}
