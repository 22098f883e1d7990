"""The train step: one for every system."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from vlm_jax.system import Batch, Context, System
from vlm_jax.train.optim import ema_update
from vlm_jax.train.state import TrainState, merge

Metrics = Mapping[str, jax.Array]


def make_train_step(system: System, tx: optax.GradientTransformation, key: jax.Array,
                    ema: float = 0.0) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function from state and global batch to the next state and scalar metrics.

    A step whose loss, gradient or statistics are not finite changes only ``step`` and ``bad_steps``.
    ``ema``: decay of the averaged weights, 0 for none.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        context = Context(rng=jax.random.fold_in(key, state.step), step=state.step, train=True)

        def objective(params):
            return system.loss(merge(params, state.frozen, state.moving), state.carry, batch, context)

        (loss, out), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(out.moving))     # XLA's max may hide a NaN
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = state.replace(
            params=params, opt_state=opt_state, moving={**state.moving, **out.moving},
            carry=system.next_carry(state.carry, out.update),
            ema=ema_update(state.ema, params, state.step, ema) if ema else state.ema)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        metrics = {**out.metrics, "loss": loss, "grad_norm": grad_norm,
                   "bad_steps": jnp.where(finite, 0, state.bad_steps + 1)}
        return kept.replace(step=state.step + 1, bad_steps=metrics["bad_steps"]), metrics

    return train_step
