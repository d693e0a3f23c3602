"""Which sample when: orders are pure functions of (seed, epoch), the same on every rank and in
every process."""

from ffcv_ssl.traversal_order.base import TraversalOrder
from ffcv_ssl.traversal_order.class_stratified import ClassStratified
from ffcv_ssl.traversal_order.quasi_random import QuasiRandom
from ffcv_ssl.traversal_order.random import Random
from ffcv_ssl.traversal_order.sequential import Sequential

__all__ = ["ClassStratified", "QuasiRandom", "Random", "Sequential", "TraversalOrder"]
