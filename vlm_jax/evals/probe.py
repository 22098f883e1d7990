"""Linear probe: a logistic regression on frozen image embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import Images, embed_images, needs
from vlm_jax.evals.evaluation import Evaluation
from vlm_jax.evals.rank import with_baselines

# CLIP sweeps 96 strengths of L2 between 1e-6 and 1e6 in C = 1/strength, coarse to fine; these are its coarse ones.
STRENGTHS = (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any = None, source: Any = None,
             train_batches: Iterable[Mapping[str, Any]] = (), train_source: Any = None, classes: Sequence[str] = (), strengths: Sequence[float] = STRENGTHS,
             iterations: int = 1000) -> Evaluation:
    """Fits on ``train_batches`` and scores on ``batches``: L2-regularised multinomial logistic regression by L-BFGS on the
    standardised unit embeddings (CLIP, section 3.2 and appendix A). The strength of the regularisation is that with the best accuracy
    on a fifth of the training images, drawn per class; then all of them are fitted.

    Args:
        predict: needs "embed".
        batches, train_batches: host batches with ``image`` and ``meta`` (``label``, an index into the classes).
        classes: names; empty takes ``train_source.classes``, or the labels' numbers. Where both sources name their classes, labels
            are matched by name: a folder may lack a class that the other has.
        strengths: of the L2 term, summed over samples (1 / scikit-learn's C).

    Returns:
        scores ``probe/top1``, with chance, interval and ``majority`` (always the most frequent training label), ``probe/mean_per_class``,
        ``probe/train`` (accuracy on what it was fitted on), ``probe/strength``.
    """
    embed = needs(predict, "embed", "probe")
    train, test = embed_images(embed, train_batches), embed_images(embed, batches)
    fitted, wanted = _labels(train, "training"), _labels(test, "evaluation")
    named, asked = (list(getattr(x, "classes", None) or ()) for x in (train_source, source))
    names = list(classes) or named or asked or list(map(str, range(int(max(fitted.max(), wanted.max())) + 1)))
    if named and asked and not classes:
        unknown = [name for name in asked if name not in named]
        if unknown:
            raise ConfigError(f"probe: class {unknown[0]!r} of the evaluation data is not one of the training data{nearest(unknown[0], named)}")
        wanted = np.array([named.index(asked[label]) for label in wanted])
    if max(fitted.max(), wanted.max()) >= len(names):
        raise ConfigError(f"probe: label {max(fitted.max(), wanted.max())} is not one of the {len(names)} classes")
    if len(np.unique(fitted)) < 2:
        raise ConfigError(f"probe: the training samples have the label {names[fitted[0]]!r} alone; a probe needs two classes or more")
    middle, spread = train.means.mean(0), train.means.std(0) + 1e-6
    x, y = (train.means - middle) / spread, fitted

    held = _held_out(y)
    strength = strengths[0]
    if len(strengths) > 1 and held.any() and not held.all():
        tried = [(_predict(x[held], *fit(x[~held], y[~held], len(names), s, iterations)).argmax(1) == y[held]).mean() for s in strengths]
        strength = strengths[len(tried) - 1 - int(np.argmax(tried[::-1]))]        # the strongest of the best
    weights = fit(x, y, len(names), strength, iterations)
    odds = _predict((test.means - middle) / spread, *weights)
    best = odds.argmax(1)
    hits = best == wanted
    counts = np.bincount(y, minlength=len(names))
    per_class = [hits[wanted == c].mean() for c in np.unique(wanted)]
    scores = {"probe/images": float(len(wanted)), "probe/train_images": float(len(y)), "probe/strength": float(strength),
              "probe/train": float((_predict(x, *weights).argmax(1) == y).mean()),
              **with_baselines("probe/top1", hits.mean(), 1 / len(names), bootstrap.mean_interval(hits), majority=(wanted == counts.argmax()).mean()),
              "probe/mean_per_class": float(np.mean(per_class))}
    items = [{"key": str(m.get("key", i)), "label": names[wanted[i]], "predicted": names[best[i]], "log_odds": float(odds[i, best[i]])}
             for i, m in enumerate(test.meta)]
    return Evaluation(scores, items)


def fit(x: np.ndarray, y: np.ndarray, classes: int, strength: float, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [d, classes] and biases [classes] that minimise sum_i -log p(y_i | x_i) + strength/2 |weights|^2."""
    x = x.astype(np.float64)
    d, rows = x.shape[1], np.arange(len(y))

    def objective(flat):
        w, b = flat[:-classes].reshape(d, classes), flat[-classes:]
        logp = log_softmax(x @ w + b, axis=1)
        error = np.exp(logp)
        error[rows, y] -= 1
        return -logp[rows, y].sum() + strength / 2 * (w * w).sum(), np.concatenate([(x.T @ error + strength * w).ravel(), error.sum(0)])

    found = minimize(objective, np.zeros((d + 1) * classes), jac=True, method="L-BFGS-B", options={"maxiter": iterations}).x
    return found[:-classes].reshape(d, classes), found[-classes:]


def _predict(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    return log_softmax(x @ w + b, axis=1)


def _labels(images: Images, which: str) -> np.ndarray:
    for meta in images.meta:
        if meta.get("label") is None:
            raise ConfigError(f"probe: {which} sample {meta.get('key')!r} has no label; name the field with data.label, or use class folders")
    return np.array([m["label"] for m in images.meta])


def _held_out(y: np.ndarray) -> np.ndarray:
    """bool [n]: every fifth sample of each class, in a fixed random order."""
    held = np.zeros(len(y), bool)
    for c in np.unique(y):
        held[np.random.default_rng(0).permutation(np.flatnonzero(y == c))[4::5]] = True
    return held
